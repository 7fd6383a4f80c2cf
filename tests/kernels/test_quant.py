"""Products with quantized weights, at every instruction set."""
import numpy as np
import pytest

import numformer as nf
from numformer import _core, quant
from tests.gradients import normal

SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97]
SPECS = [quant.QuantSpec(bits, group, symmetric, scale)
         for bits in (4, 8) for group, symmetric, scale in
         [(None, True, "float16"), (128, True, "float16"), (32, False, "float32"), (5, False, "float16")]]


def integers(*shape, low=-128, high=127, seed=0):
    return np.random.default_rng([seed, *shape]).integers(low, high, shape, np.int8, endpoint=True)


def exact(a, b):
    return a.astype(np.int64) @ b.astype(np.int64).T


def weight(n, k, spec, seed=0):
    """A quantized weight of arbitrary integers, extreme ones among them, and the float64 matrix that it stands for."""
    rng = np.random.default_rng([seed, n, k])
    low, high = {(4, True): (-8, 7), (8, True): (-127, 127), (4, False): (0, 15), (8, False): (0, 255)}[
        spec.bits, spec.symmetric]
    size = min(spec.group_size or k, k)
    groups = -(-k // size)
    q = rng.integers(low, high, (n, k), np.int16, endpoint=True)
    q[0], q[-1] = low, high
    scales = rng.uniform(-2, 2, (n, groups)).astype(spec.scale_dtype)
    zeros = None if spec.symmetric else rng.integers(0, high, (n, groups), np.uint8, endpoint=True)
    shift = 0 if zeros is None else np.repeat(zeros.astype(float), size, 1)[:, :k]
    made = quant.QuantizedWeight.from_integers(spec, q, scales, zeros)
    return made, (q - shift) * np.repeat(scales.astype(float), size, 1)[:, :k]


def quantized_rows(x):
    """(scale, integers) of each row, as the documentation says, in float32."""
    most = np.abs(x).max(-1, keepdims=True, initial=0)
    inverse = np.float32(127) / np.where(most > 0, most, np.float32(1))
    return most / np.float32(127), np.rint(x * inverse).astype(np.int64)


def reference(x, qweight, bias=None):
    """quant.linear with "int8", to the last bit: integers, then float32 in ascending order of groups."""
    scale, q = quantized_rows(x)
    w = qweight.integers.astype(np.int64)
    k = w.shape[1]
    size = min(qweight.spec.group_size or k, k)
    y = np.zeros((len(x), len(w)), np.float32)
    for g in range(-(-k // size)):
        columns = slice(g * size, (g + 1) * size)
        zero = 0 if qweight.zeros is None else qweight.zeros[:, g, None].astype(np.int64)
        y += exact(q[:, columns], w[:, columns] - zero).astype(np.float32) * qweight.scales[:, g].astype(np.float32)
    y *= scale
    return y if bias is None else y + bias


@pytest.mark.parametrize("k", SIZES + [260])
def test_int8_matmul_is_exact(k, threads):
    for m, n in [(1, 1), (2, 17), (7, 33), (13, 16), (65, 40)]:
        a, b = integers(m, k), integers(n, k, seed=1)
        for count in (1, 2):
            threads(count)
            y = quant.int8_matmul(a, b)
            assert y.dtype == np.int32 and (y == exact(a, b)).all()


def test_int8_matmul_of_extreme_values_does_not_saturate():
    for k in (1, 64, 1000, 65536):
        for left in (-128, 127):
            for right in (-128, 127):
                a, b = np.full((3, k), left, np.int8), np.full((17, k), right, np.int8)
                assert (quant.int8_matmul(a, b) == left * right * k).all()


def test_int8_matmul_over_threads_and_strides(threads):
    a, b = integers(300, 512), integers(200, 512, seed=1)
    for count in (1, 2):
        threads(count)
        assert (quant.int8_matmul(a[::3, ::2], b[::-1, 1::2]) == exact(a[::3, ::2], b[::-1, 1::2])).all()
        assert (quant.int8_matmul(a, b) == exact(a, b)).all()


@pytest.mark.parametrize("m, k", [(1, 40), (13, 9), (210, 72)])
def test_int8_matmul_of_many_columns(m, k, threads):
    a, b = integers(m, k), integers(1030, k, seed=1)
    for count in (1, 2):
        threads(count)
        assert (quant.int8_matmul(a, b) == exact(a, b)).all()


def test_int8_matmul_of_nothing():
    assert quant.int8_matmul(integers(0, 4), integers(3, 4)).shape == (0, 3)
    assert quant.int8_matmul(integers(2, 4), integers(0, 4)).shape == (2, 0)
    assert (quant.int8_matmul(integers(2, 0), integers(3, 0)) == np.zeros((2, 3))).all()


def test_int8_matmul_names_bad_inputs():
    with pytest.raises(TypeError, match="a must be int8, got uint8"):
        quant.int8_matmul(np.zeros((2, 2), np.uint8), integers(2, 2))
    with pytest.raises(ValueError, match=r"b must have shape \(3, 4\), got \(3, 5\)"):
        quant.int8_matmul(integers(2, 4), integers(3, 5))
    with pytest.raises(ValueError, match="K may be 65536 at most"):
        quant.int8_matmul(np.zeros((1, 65537), np.int8), np.zeros((1, 65537), np.int8))
    with pytest.raises(ValueError, match="2 dimensions"):
        quant.int8_matmul(integers(4), integers(3, 4))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear_has_the_bits_of_its_definition(spec, threads):
    for m, n, k in [(1, 1, 1), (2, 3, 7), (3, 17, 33), (5, 16, 64), (6, 15, 128), (13, 40, 131), (20, 65, 300)]:
        x, bias = normal(m, k, dtype=np.float32), normal(n, dtype=np.float32)
        qweight, _ = weight(n, k, spec)
        for count in (1, 2):
            threads(count)
            assert (quant.linear(x, qweight) == reference(x, qweight)).all()
            assert (quant.linear(x, qweight, bias) == reference(x, qweight, bias)).all()


@pytest.mark.parametrize("k", SIZES)
def test_every_depth_and_width(k):
    for spec in SPECS:
        for n in (1, 17, k):
            qweight, w = weight(n, k, spec)
            x = normal(3, k, dtype=np.float32)
            assert (quant.linear(x, qweight) == reference(x, qweight)).all()
            bound = (np.abs(x.astype(float)) @ np.abs(w).T) * (k + 4) * 2.0**-24 + 1e-30
            assert (np.abs(quant.linear(x, qweight, compute="float32") - x.astype(float) @ w.T) <= bound).all()


@pytest.mark.parametrize("m, n, k", [(40, 150, 140), pytest.param(230, 700, 520, marks=pytest.mark.native)])
def test_many_rows_and_columns(m, n, k, threads):
    for spec in SPECS[:4] + SPECS[5:6]:
        qweight, w = weight(n, k, spec)
        x = normal(m, k, dtype=np.float32)
        whole, floats = reference(x, qweight), x.astype(float) @ w.T
        for count in (1, 2):
            threads(count)
            assert (quant.linear(x, qweight) == whole).all()
            np.testing.assert_allclose(quant.linear(x, qweight, compute="float32"), floats, rtol=0,
                                       atol=1e-6 * np.abs(floats).max())


@pytest.mark.parametrize("compute", ["int8", "float32"])
def test_bits_of_a_row_do_not_depend_on_rows_threads_or_shape(compute, threads):
    for spec in SPECS:
        qweight, _ = weight(90, 200, spec)
        x = normal(40, 200, dtype=np.float32)
        whole = quant.linear(x, qweight, compute=compute, activation="gelu")
        assert (quant.linear(x.reshape(2, 4, 5, 200), qweight, compute=compute, activation="gelu").reshape(40, 90)
                == whole).all()
        threads(1)
        for rows in (1, 2, 3, 6, 7, 13):
            assert (quant.linear(x[5:5 + rows], qweight, compute=compute, activation="gelu")
                    == whole[5:5 + rows]).all()
        threads(2)


def test_extreme_integers_stay_exact():
    k = 4096
    for spec in (quant.QuantSpec(4, None), quant.QuantSpec(8, None), quant.QuantSpec(4, 64, False),
                 quant.QuantSpec(8, None, False)):
        low, high = (0, 2**spec.bits - 1) if not spec.symmetric else (-8, 7) if spec.bits == 4 else (-127, 127)
        groups = 1 if spec.group_size is None else k // spec.group_size
        for value in (low, high):
            zeros = None if spec.symmetric else np.full((20, groups), high - value, np.uint8)
            q = quant.QuantizedWeight.from_integers(spec, np.full((20, k), value, np.int16),
                                                    np.ones((20, groups), np.float16), zeros)
            for sign in (1, -1):
                x = np.full((7, k), sign * 127, np.float32)
                assert (quant.linear(x, q) == reference(x, q)).all()


def test_float16_scales_are_read_exactly():
    """Every finite float16: normal, subnormal and zero, of both signs."""
    scales = np.arange(65536, dtype=np.uint16).view(np.float16)
    scales = scales[np.isfinite(scales)]
    q = quant.QuantizedWeight.from_integers(quant.QuantSpec(8, None), np.ones((len(scales), 1), np.int16),
                                            scales[:, None])
    assert (quant.linear(np.float32([[127]]), q)[0] == 127 * scales.astype(np.float32)).all()
    assert (quant.linear(np.float32([[1]]), q, compute="float32")[0] == scales.astype(np.float32)).all()


def test_rows_of_zeros_tiny_numbers_nan_and_infinity():
    qweight, _ = weight(20, 50, SPECS[1])
    x = normal(6, 50, dtype=np.float32)
    good = quant.linear(x, qweight)
    x[1] = 0
    x[2, 49] = np.nan
    x[3, 0] = -np.inf
    x[4] = 2.0**-121
    y = quant.linear(x, qweight)
    assert (y[[0, 5]] == good[[0, 5]]).all() and (y[[1, 4]] == 0).all() and np.isnan(y[2:4]).all()
    x[4] = 2.0**-119
    assert (quant.linear(x, qweight)[4] != 0).any()
    x[4] = np.finfo(np.float32).max
    assert np.isfinite(quant.linear(x * np.float32(1), quant.quantize(np.eye(50, dtype=np.float32) / 4))[4]).all()


@pytest.mark.parametrize("compute", ["int8", "float32"])
def test_activation_and_bias_are_those_of_the_ops(compute):
    qweight, _ = weight(33, 40, SPECS[3])
    x, bias = normal(9, 40, dtype=np.float32) / 50, normal(33, dtype=np.float32)
    plain = quant.linear(x, qweight, bias, compute=compute)
    for name, f in {"gelu": nf.gelu, "gelu_tanh": lambda z: nf.gelu(z, "tanh"),
                    "gelu_quick": lambda z: nf.gelu(z, "quick"), "silu": nf.silu,
                    "relu": lambda z: np.maximum(z, 0)}.items():
        assert (quant.linear(x, qweight, bias, compute=compute, activation=name) == f(plain)).all()


def test_out_strides_and_empty_batches():
    qweight, _ = weight(10, 24, SPECS[0])
    x = normal(8, 48, dtype=np.float32)
    out = np.full((4, 10), np.nan, np.float32)
    y = quant.linear(x[::2, ::2], qweight, out=out)
    assert y is out and (out == reference(np.ascontiguousarray(x[::2, ::2]), qweight)).all()
    assert quant.linear(np.zeros((2, 0, 24), np.float32), qweight).shape == (2, 0, 10)
    assert (quant.linear(x[0, :24], qweight) == quant.linear(x[:1, :24], qweight)[0]).all()
    x = nf.Tensor(x[:4, :24].copy(), requires_grad=True)
    y = quant.linear(x, qweight, activation="gelu", out=out)
    y.backward(np.ones((4, 10), np.float32))
    assert y.numpy() is out and (out == quant.linear(x.data, qweight, activation="gelu")).all()
    again = nf.Tensor(x.data, requires_grad=True)
    quant.linear(again, qweight, activation="gelu").backward(np.ones((4, 10), np.float32))
    assert (x.grad == again.grad).all()


def test_nothing_is_written_around_the_result():
    for n in (1, 5, 15, 17, 31):
        for compute in ("int8", "float32"):
            qweight, _ = weight(n, 30, SPECS[2])
            memory = np.full(7 * n + 128, 12345, np.float32)
            x, out = normal(7, 30, dtype=np.float32), memory[64:64 + 7 * n].reshape(7, n)
            quant.linear(x, qweight, compute=compute, out=out)
            assert (memory[:64] == 12345).all() and (memory[64 + 7 * n:] == 12345).all()


def test_int8_gives_the_same_bits_on_every_instruction_set(isa):
    for spec in SPECS:
        qweight, _ = weight(50, 333, spec)
        x = normal(9, 333, dtype=np.float32)
        here = quant.linear(x, qweight, normal(50, dtype=np.float32))
        _core.cap_isa("baseline")
        assert (quant.linear(x, qweight, normal(50, dtype=np.float32)) == here).all()
        _core.cap_isa(isa)


def test_gradients_of_x_and_bias_are_straight_through():
    for activation, derivative in {None: lambda z: np.ones_like(z), "relu": lambda z: z > 0,
                                   "silu": lambda z: (1 + np.exp(-z) * (1 + z)) / (1 + np.exp(-z)) ** 2}.items():
        qweight = quant.quantize(normal(12, 20, dtype=np.float32))
        x, bias = (nf.Tensor(normal(*shape, dtype=np.float32), requires_grad=True) for shape in [(2, 3, 20), (12,)])
        y = quant.linear(x, qweight, bias, activation=activation)
        assert type(y) is nf.Tensor
        assert (y.data == quant.linear(x.data, qweight, bias.data, activation=activation)).all()
        dy = normal(2, 3, 12, dtype=np.float32, seed=3)
        y.backward(dy)
        z = quant.linear(x.data, qweight, bias.data).astype(float)
        dz = dy * derivative(z)
        np.testing.assert_allclose(x.grad, dz @ qweight.dequantize().astype(float), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bias.grad, dz.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_row_does_not_depend_on_the_rows_beside_it():
    qweight = quant.quantize(normal(300, 700, dtype=np.float32))
    x, dy = normal(40, 700, dtype=np.float32), normal(40, 300, dtype=np.float32, seed=3)

    def gradient(rows):
        leaf = nf.Tensor(x[rows], requires_grad=True)
        quant.linear(leaf, qweight).backward(dy[rows])
        return leaf.grad

    whole = gradient(slice(40))
    for rows in (slice(0), slice(1), slice(7, 8), slice(3, 30)):
        np.testing.assert_array_equal(gradient(rows), whole[rows])


def test_nothing_is_recorded_without_need():
    qweight = quant.quantize(normal(12, 20, dtype=np.float32))
    x = nf.Tensor(normal(3, 20, dtype=np.float32))
    assert not quant.linear(x, qweight, activation="gelu").requires_grad
    with nf.no_grad():
        leaf = nf.Tensor(x.data, requires_grad=True)
        assert not quant.linear(leaf, qweight).requires_grad


def test_linear_names_bad_inputs():
    qweight, _ = weight(6, 10, SPECS[0])
    x = normal(3, 10, dtype=np.float32)
    with pytest.raises(TypeError, match="x must be float32, got float64"):
        quant.linear(x.astype(float), qweight)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 10\) for a weight of .*, got \(3, 9\)"):
        quant.linear(x[:, :9], qweight)
    with pytest.raises(ValueError, match="x must have shape"):
        quant.linear(np.float32(3), qweight)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        quant.linear(x, qweight, np.zeros(5, np.float32))
    with pytest.raises(TypeError, match="bias must be float32"):
        quant.linear(x, qweight, np.zeros(6))
    with pytest.raises(TypeError, match="qweight must be a QuantizedWeight, got ndarray"):
        quant.linear(x, x)
    with pytest.raises(ValueError, match=r"compute must be .*, got 'int4'"):
        quant.linear(x, qweight, compute="int4")
    with pytest.raises(ValueError, match=r'activation must be None, "gelu", .* or "relu"'):
        quant.linear(x, qweight, activation="tanh")
    for given in (x, nf.Tensor(x, requires_grad=True)):
        for activation in (None, "gelu"):
            with pytest.raises(ValueError, match=r"linear: out must have shape \(3, 6\)"):
                quant.linear(given, qweight, activation=activation, out=np.zeros((3, 5), np.float32))
            with pytest.raises(TypeError, match="linear: out must be float32, got float64"):
                quant.linear(given, qweight, activation=activation, out=np.zeros((3, 6)))
    square, _ = weight(10, 10, SPECS[0])
    with pytest.raises(ValueError, match="share memory"):
        quant.linear(x, square, out=x)
    long = quant.QuantizedWeight(quant.QuantSpec(8, None), (1, 70000), np.zeros((1, 70000), np.uint8),
                                 np.ones((1, 1), np.float16))
    with pytest.raises(ValueError, match="a group may have 65536 values at most, got 70000"):
        quant.linear(np.zeros((1, 70000), np.float32), long)
