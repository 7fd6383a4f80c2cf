"""Quantized weights as objects: grids, storage, errors to expect."""
import copy
import dataclasses
import json
import pickle
import warnings

import numpy as np
import pytest

from numformer import quant
from numformer.quant import QuantizedWeight, QuantSpec
from tests.gradients import normal

SPECS = [QuantSpec(bits, group, symmetric) for bits in (4, 8) for group in (None, 32, 7) for symmetric in (True, False)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("k", [1, 6, 7, 31, 64, 65])
def test_every_value_is_within_half_a_step(spec, k):
    for dtype in (np.float32, np.float64):
        w = normal(9, k, dtype=dtype)
        q = quant.quantize(w, spec)
        size = min(spec.group_size or k, k)
        step = np.repeat(np.abs(q.scales.astype(float)), size, 1)[:, :k]
        # 4 symmetric bits: the far end of the range, +7, may cut off up to a step more; a float16 scale is off by 2^-11
        slack = 1.0 if spec.bits == 4 and spec.symmetric else 0.5
        assert (np.abs(q.dequantize() - w) <= step * (slack + 2**spec.bits * 2.0**-11)).all()
        assert q.shape == w.shape and q.dequantize().dtype == np.float32


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_on_the_grid_stays(spec):
    """Quantizing what was quantized changes nothing, but for the sign of a 4-bit scale where -8 s is not taken."""
    q = quant.quantize(normal(11, 45, dtype=np.float32), dataclasses.replace(spec, scale_dtype="float32"))
    w = q.dequantize()
    again = quant.quantize(w, q.spec).dequantize()
    np.testing.assert_allclose(again, w, rtol=0, atol=2e-6 * np.abs(w).max())


def test_largest_magnitude_is_minus_8_whatever_its_sign():
    for sign in (1, -1):
        w = np.array([[0.5, -1.0, 4.0, 2.0]], np.float32) * sign
        q = quant.quantize(w, QuantSpec(4, None))
        assert q.scales[0, 0] == -0.5 * sign and (q.integers == [[-1, 2, -8, -4]]).all()
        assert (q.dequantize() == w).all()


def test_integers_and_zeros_are_what_the_formula_says():
    w = np.array([[-1.0, 0.0, 2.0, 14.0]], np.float32)
    q = quant.quantize(w, QuantSpec(4, None, symmetric=False))
    assert q.scales[0, 0] == 1 and q.zeros[0, 0] == 1 and (q.integers == [[0, 1, 3, 15]]).all()
    assert q.integers.dtype == np.uint8 and (q.dequantize() == w).all()
    positive = quant.quantize(np.array([[5.0, 255.0]], np.float32), QuantSpec(8, None, symmetric=False))
    assert positive.zeros[0, 0] == 0 and (positive.integers == [[5, 255]]).all()
    symmetric = quant.quantize(np.array([[-127.0, 2.5, 3.5]], np.float32), QuantSpec(8, None))
    assert symmetric.integers.dtype == np.int8 and (symmetric.integers == [[-127, 2, 4]]).all()     # halves to even


def test_a_group_of_zeros_is_exact():
    w = normal(3, 20, dtype=np.float32)
    w[1, 8:16] = 0
    for spec in SPECS:
        q = quant.quantize(w, dataclasses.replace(spec, group_size=8))
        assert (q.dequantize()[1, 8:16] == 0).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [3e-4, 1e-5, 1e-6, 3e-7, 1e-7])
def test_a_scale_that_is_hardly_a_float16_neither_is_0_nor_cuts_off_the_largest_value(spec, size):
    w = normal(9, 63, dtype=np.float32) * np.float32(size)
    q = quant.quantize(w, spec)
    # the end +7 of 4 symmetric bits is a step short of the largest value
    step = np.repeat(np.abs(q.scales.astype(float)), min(spec.group_size or 63, 63), 1)[:, :63]
    slack = 1.0 if spec.bits == 4 and spec.symmetric else 0.5
    assert (q.scales != 0).all() and (np.abs(q.dequantize() - w) <= step * (slack + 2**spec.bits * 2.0**-11)).all()


def test_a_group_that_becomes_zeros_is_told_of():
    w = normal(3, 64, dtype=np.float32)
    w[1, 32:] *= 1e-9
    with pytest.warns(UserWarning, match=r'1 of 6 groups become zeros: .*; use scale_dtype="float32"'):
        q = quant.quantize(w, QuantSpec(4, 32))
    assert not q.dequantize()[1, 32:].any() and q.dequantize()[1, :32].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = quant.quantize(w, QuantSpec(4, 32, scale_dtype="float32"))
        quant.quantize(np.zeros((2, 32)), QuantSpec(4, 32))
    np.testing.assert_allclose(fine.dequantize()[1, 32:], w[1, 32:], atol=2e-10)


def test_even_k_is_the_low_nibble():
    q = QuantizedWeight.from_integers(QuantSpec(4, None), np.array([[-8, 7, 0]]), np.ones((1, 1), np.float16))
    assert (q.data == [[0 | 15 << 4, 8]]).all()


def test_bits_per_weight_counts_everything():
    w = normal(16, 1024, dtype=np.float32)
    for spec, bits in [(QuantSpec(4, 128), 4.125), (QuantSpec(4, 32), 4.5), (QuantSpec(4, 128, False), 4 + 24 / 128),
                       (QuantSpec(8, None), 8 + 16 / 1024), (QuantSpec(8, 128, scale_dtype="float32"), 8.25)]:
        q = quant.quantize(w, spec)
        assert q.bits_per_weight == bits and q.nbytes == bits * w.size / 8


def test_errors_are_those_of_the_literature():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((512, 4096)).astype(np.float32)
    heavy = rng.standard_t(5, (512, 4096)).astype(np.float32)
    for matrix, spec, percent in [(w, QuantSpec(8, None), 0.87), (w, QuantSpec(8, 128), 0.65),
                                  (w, QuantSpec(8, 128, False), 0.59), (w, QuantSpec(8, 32), 0.54),
                                  (w, QuantSpec(4, 128), 10.3), (w, QuantSpec(4, 128, False), 10.1),
                                  (w, QuantSpec(4, 32, False), 8.1), (heavy, QuantSpec(8, None), 1.99),
                                  (heavy, QuantSpec(8, 128), 0.95)]:
        error = np.linalg.norm(quant.quantize(matrix, spec).dequantize() - matrix) / np.linalg.norm(matrix)
        assert error * 100 == pytest.approx(percent, rel=0.02)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_arrays_make_the_weight_again(spec):
    q = quant.quantize(normal(5, 33, dtype=np.float32), spec)
    text = json.dumps(dataclasses.asdict(q.spec))
    arrays = {name: np.array(a) for name, a in q.arrays().items()}
    for again in (QuantizedWeight.from_arrays(arrays, json.loads(text)), QuantizedWeight.from_arrays(arrays, q.spec),
                  pickle.loads(pickle.dumps(q)), copy.deepcopy(q),
                  QuantizedWeight.from_integers(q.spec, q.integers, q.scales, q.zeros)):
        assert again.spec == q.spec and again.shape == q.shape
        assert (again.integers == q.integers).all() and (again.dequantize() == q.dequantize()).all()
        x = normal(2, 33, dtype=np.float32)
        assert (quant.linear(x, again) == quant.linear(x, q)).all()


def test_strides_do_not_matter():
    w = normal(20, 40, dtype=np.float32)
    q = quant.quantize(w[::2, ::-1])
    assert (q.dequantize() == quant.quantize(np.ascontiguousarray(w[::2, ::-1])).dequantize()).all()


def test_bad_specs_are_named():
    for fields, text in [({"bits": 5}, "bits must be 4 or 8, got 5"), ({"group_size": 0}, "group_size must be"),
                         ({"group_size": 1.5}, "group_size must be"), ({"scale_dtype": "int8"}, "scale_dtype must be")]:
        with pytest.raises(ValueError, match=text):
            QuantSpec(**fields)
    for symmetric in ("no", None, 2):
        with pytest.raises(ValueError, match=f"symmetric must be True or False, got {symmetric!r}"):
            QuantSpec(symmetric=symmetric)
    assert QuantSpec(symmetric=np.True_) == QuantSpec()


def test_bad_weights_are_named():
    w = normal(4, 5, dtype=np.float32)
    for bad in (np.nan, np.inf):
        broken = w.copy()
        broken[2, 3] = bad
        with pytest.raises(ValueError, match=rf"weight must be finite, got {bad} at \[2, 3\]"):
            quant.quantize(broken)
    with pytest.raises(TypeError, match="float32 or float64, got int64"):
        quant.quantize(w.astype(int))
    for shape in [(0, 3), (3, 0), (3,), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"weight must have shape \(N, K\)"):
            quant.quantize(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match='beyond float16; use scale_dtype="float32"'):
        quant.quantize(w * 1e6)
    assert np.isfinite(quant.quantize(w * 1e6, QuantSpec(scale_dtype="float32")).dequantize()).all()
    with pytest.raises(TypeError, match="spec must be a QuantSpec, got int"):
        quant.quantize(w, 4)


def test_bad_arrays_are_named():
    q = quant.quantize(normal(4, 5, dtype=np.float32), QuantSpec(4, None, False))
    arrays = q.arrays()
    with pytest.raises(ValueError, match="scales is missing"):
        QuantizedWeight.from_arrays({k: v for k, v in arrays.items() if k != "scales"}, q.spec)
    wrong = {"data": arrays["data"][:, :2], "scales": arrays["scales"].astype(np.float32), "zeros": None}
    for name, bad in wrong.items():
        with pytest.raises(ValueError, match=f"{name} must be a"):
            QuantizedWeight.from_arrays(arrays | {name: bad}, q.spec)
    with pytest.raises(ValueError, match=r"zeros of 4 bits must be 0\.\.15, got 16"):
        QuantizedWeight.from_arrays(arrays | {"zeros": np.full((4, 1), 16, np.uint8)}, q.spec)
    with pytest.raises(ValueError, match="scales must be finite"):
        QuantizedWeight.from_arrays(arrays | {"scales": arrays["scales"] * np.float16(np.nan)}, q.spec)
    with pytest.raises(ValueError, match=r"integers must be 0\.\.15, got 0\.\.16"):
        QuantizedWeight.from_integers(q.spec, np.array([[0, 16]]), q.scales[:1], q.zeros[:1])
    with pytest.raises(ValueError, match="zeros were given"):
        QuantizedWeight(QuantSpec(4, None), (4, 5), arrays["data"], arrays["scales"], arrays["zeros"])


@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(4, 16, symmetric=False), QuantSpec(8, None)])
def test_a_lookup_gives_the_rows_of_the_dequantized_weight(spec):
    q = quant.quantize(np.random.default_rng(0).standard_normal((10, 33)), spec)
    for ids in np.array([[3, 9], [0, 3]]), np.uint8(4), np.zeros((0,), int):
        np.testing.assert_array_equal(quant.embedding(ids, q), q.dequantize()[ids])
    with pytest.raises(ValueError, match=r"within 0 \.\. 9, got 10 at position 2"):
        quant.embedding([[1, 2], [10, -1]], q)
    with pytest.raises(ValueError, match="got -1 at position 0"):
        quant.embedding(-1, q)
    with pytest.raises(TypeError, match="ids must be an array of integers, got float64"):
        quant.embedding([1.0], q)
    with pytest.raises(TypeError, match="must be a QuantizedWeight, got ndarray"):
        quant.embedding([1], np.ones((2, 2)))


def test_no_rows_have_no_bits():
    none = quant.quantize(np.ones((4, 8), np.float32)).rows(np.zeros(0, int))
    assert none.bits_per_weight == 0 and "0 bits per weight" in repr(none) and none.dequantize().shape == (0, 8)
