import functools

import numpy as np
import pytest

import numformer as nf
from tests import oracle
from tests.gradients import check_gradients, normal

SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 97, 1000]
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.3, "z_loss": 0.2},
           {"reduction": "sum"}, {"reduction": "none", "label_smoothing": 0.1}]


def classes(rows, n, ignored=()):
    t = np.random.default_rng(rows + n).integers(0, n, rows)
    t[list(ignored)] = -100
    return t


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype, rtol", [(np.float32, 3e-6), (np.float64, 1e-13)])
def test_matches_the_float64_formula(n, dtype, rtol):
    x, t = 3 * normal(7, n, dtype=dtype), classes(7, n, [2])
    for options in OPTIONS:
        loss = nf.cross_entropy(x, t, **options)
        np.testing.assert_allclose(loss, oracle.cross_entropy(x, t, **options), rtol=rtol, atol=2 * rtol)
        assert loss.dtype == dtype


@pytest.mark.parametrize("n", [1, 5, 33])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_match_finite_differences(n, options):
    t = classes(4, n, [1])
    check_gradients(lambda x: nf.cross_entropy(x, t, **options), normal(4, n), atol=1e-7)


def test_agrees_with_torch():
    torch = pytest.importorskip("torch")
    x, t = normal(3, 4, 50), classes(12, 50, [5]).reshape(3, 4)
    for smoothing in (0.0, 0.2):
        ours, theirs = nf.Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
        loss = nf.cross_entropy(ours, t, label_smoothing=smoothing)
        want = torch.nn.functional.cross_entropy(theirs.reshape(12, 50), torch.tensor(t).reshape(12),
                                                 label_smoothing=smoothing)
        loss.backward()
        want.backward()
        np.testing.assert_allclose(loss.item(), want.item(), rtol=1e-12)
        np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_ignored_rows_count_for_nothing_whatever_they_hold():
    x, t = normal(5, 9), classes(5, 9, [1, 3])
    x[[1, 3]] = np.nan
    tensor = nf.Tensor(x, requires_grad=True)
    loss = nf.cross_entropy(tensor, t, label_smoothing=0.1)
    loss.backward()
    kept = [0, 2, 4]
    np.testing.assert_allclose(loss.item(), nf.cross_entropy(x[kept], t[kept], label_smoothing=0.1), rtol=1e-14)
    assert (tensor.grad[[1, 3]] == 0).all() and np.isfinite(tensor.grad).all()
    assert nf.cross_entropy(x, np.full(5, -100)) == 0
    assert nf.cross_entropy(x[kept], t[kept] * 0 + 3, ignore_index=3) == 0


def test_masked_classes_do_not_matter():
    x, t = normal(5, 9), classes(5, 8)
    x[:, 8] = -np.inf
    np.testing.assert_allclose(nf.cross_entropy(x, t), nf.cross_entropy(x[:, :8].copy(), t), rtol=1e-14)
    tensor = nf.Tensor(x, requires_grad=True)
    nf.cross_entropy(tensor, t).backward()
    assert (tensor.grad[:, 8] == 0).all() and np.isfinite(tensor.grad).all()
    tensor = nf.Tensor(x.astype(np.float32), requires_grad=True)
    nf.cross_entropy(tensor, t).backward(np.float32(65536))
    assert (tensor.grad[:, 8] == 0).all()


@pytest.mark.parametrize("n", [100, 1000])
def test_gradients_are_right_down_to_the_denormals(n):
    x, t = np.linspace(-120, 0, n, dtype=np.float32)[None], np.zeros(1, np.int64)
    tensor = nf.Tensor(x, requires_grad=True)
    nf.cross_entropy(tensor, t).backward(np.float32(1e-3))
    want = np.exp(oracle.log_softmax(x.astype(float))) * 1e-3
    np.testing.assert_allclose(tensor.grad[0, 1:], want[0, 1:], rtol=1e-4, atol=2e-45)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("n", [1, 3, 17, 97])
def test_token_log_probs_are_log_softmax_at_the_targets(n, temperature):
    x, t = normal(2, 3, n), classes(6, n).reshape(2, 3)
    want = np.take_along_axis(oracle.log_softmax(x / temperature), t[..., None], -1)[..., 0]
    np.testing.assert_allclose(nf.token_log_probs(x, t, temperature=temperature), want, rtol=1e-12, atol=1e-13)
    t[0, 1] = -100
    assert nf.token_log_probs(x, t)[0, 1] == 0
    if n < 20:
        check_gradients(lambda x: nf.token_log_probs(x, t, temperature=temperature), x, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("n", [1, 3, 17, 97])
def test_entropy_matches_the_float64_formula(n, temperature):
    x = normal(4, n)
    logp = oracle.log_softmax(x / temperature)
    want = -(np.exp(logp) * logp).sum(-1)
    np.testing.assert_allclose(nf.softmax_entropy(x, temperature=temperature), want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(nf.softmax_entropy(x.astype("f"), temperature=temperature), want, rtol=1e-5, atol=1e-6)
    if n < 20:
        check_gradients(lambda x: nf.softmax_entropy(x, temperature=temperature), x, atol=1e-7)


def test_gradients_of_entropy_are_right_down_to_the_denormals():
    x = np.linspace(-120, 0, 1000, dtype=np.float32)[None]
    x[0, 5] = -np.inf
    logp = oracle.log_softmax(x.astype(float))
    p = np.exp(logp)
    entropy = -(p * np.maximum(logp, -1000)).sum()
    for scale in (1e-3, 1.0, 65536.0):
        tensor = nf.Tensor(x, requires_grad=True)
        nf.softmax_entropy(tensor).backward(np.float32(scale))
        want = -scale * p * (np.maximum(logp, -1000) + entropy)
        np.testing.assert_allclose(tensor.grad, want, rtol=1e-4, atol=3e-45)
        assert tensor.grad[0, 5] == 0


@pytest.mark.parametrize("offset", [0, 100, 1000, 1e5])
def test_what_all_logits_of_a_row_have_in_common_costs_no_digits(offset):
    x, t = (normal(20, 517) * 3 + offset).astype(np.float32), classes(20, 517)
    logp = oracle.log_softmax(x.astype(float))
    p, there = np.exp(logp), np.eye(517)[t]
    entropy = -(p * logp).sum(-1)
    wants = [(lambda x: nf.cross_entropy(x, t, reduction="none"), -(logp * there).sum(-1), p - there),
             (lambda x: nf.token_log_probs(x, t), (logp * there).sum(-1), there - p),
             (nf.softmax_entropy, entropy, -p * (logp + entropy[:, None]))]
    for op, want, gradient in wants:
        tensor = nf.Tensor(x, requires_grad=True)
        value = op(tensor)
        value.sum().backward()
        np.testing.assert_allclose(value.data, want, rtol=4e-7)
        assert np.linalg.norm(tensor.grad - gradient) < 3e-7 * np.linalg.norm(gradient)


def test_entropy_of_masked_classes_is_that_of_the_others():
    x = normal(3, 9)
    x[:, 4] = x[1] = -np.inf
    np.testing.assert_allclose(nf.softmax_entropy(x)[[0, 2]], nf.softmax_entropy(np.delete(x, 4, 1))[[0, 2]])
    tensor = nf.Tensor(x, requires_grad=True)
    nf.softmax_entropy(tensor).sum().backward()
    assert nf.softmax_entropy(x)[1] == 0
    assert np.isfinite(tensor.grad).all() and (tensor.grad[1] == 0).all() and (tensor.grad[:, 4] == 0).all()


def test_bits_do_not_depend_on_threads_strides_or_company(threads):
    x, t = normal(90, 517, dtype=np.float32), classes(90, 517, [3])

    def results(x, t):
        tensor = nf.Tensor(x, requires_grad=True)
        nf.cross_entropy(tensor, t, reduction="sum").backward()
        return (nf.cross_entropy(x, t, reduction="none"), nf.token_log_probs(x, t, temperature=2), tensor.grad,
                nf.softmax_entropy(x))

    whole, mean = results(x, t), nf.cross_entropy(x, t)
    threads(1)
    assert nf.cross_entropy(x, t) == mean
    for part in (slice(7, 8), slice(2, 60, 3), slice(None)):
        for got, want in zip(results(x[part], t[part]), whole):
            assert (got == want[part]).all()
    for got, want in zip(results(np.asfortranarray(x), t.astype(np.int32)), whole):
        assert (got == want).all()


def test_empty_batches():
    assert nf.cross_entropy(np.zeros((0, 4)), np.zeros(0, int)) == 0
    assert nf.cross_entropy(np.zeros((0, 4)), np.zeros(0, int), reduction="none").shape == (0,)
    assert nf.softmax_entropy(np.zeros((0, 4))).shape == (0,)


def test_dy_of_each_row_may_be_broadcast():
    x, t = nf.Tensor(normal(4, 5), requires_grad=True), classes(4, 5)
    nf.cross_entropy(x, t, reduction="none").sum().backward()
    y = nf.Tensor(x.data, requires_grad=True)
    nf.cross_entropy(y, t, reduction="sum").backward()
    np.testing.assert_array_equal(x.grad, y.grad)


def test_bad_inputs_are_named():
    x, t = np.zeros((2, 3, 4)), np.zeros((2, 3), int)
    for bad in (4, -1, 2**40):
        wrong = t.copy()
        wrong[1, 1] = bad
        for op in (nf.cross_entropy, nf.token_log_probs):
            message = rf"^{op.__name__}: targets must be within 0 .. 3, got {bad} at position 4"
            with pytest.raises(ValueError, match=message):
                op(x, wrong)
    with pytest.raises(ValueError, match=r"targets must have shape \(2, 3\), got \(3, 2\)"):
        nf.cross_entropy(x, t.T)
    with pytest.raises(TypeError, match="integers"):
        nf.cross_entropy(x, t.astype(float))
    with pytest.raises(TypeError, match="float32 or float64"):
        nf.cross_entropy(x.astype(int), t)
    with pytest.raises(ValueError, match="reduction"):
        nf.cross_entropy(x, t, reduction="average")
    with pytest.raises(ValueError, match="label_smoothing"):
        nf.cross_entropy(x, t, label_smoothing=1.5)
    with pytest.raises(ValueError, match="dimension"):
        nf.cross_entropy(np.zeros(()), t)
    calls = {"cross_entropy": functools.partial(nf.cross_entropy, x, t),
             "linear_cross_entropy": functools.partial(nf.linear_cross_entropy, x, np.ones((5, 4)), t)}
    for op, call in calls.items():
        for option in ("label_smoothing", "z_loss"):
            with pytest.raises(TypeError, match=f"^{op}: {option} must be a real number, got '0'"):
                call(**{option: "0"})
        with pytest.raises(TypeError, match=f"^{op}: ignore_index must be an integer, got 1.5"):
            call(ignore_index=1.5)
    for op, call in (("token_log_probs", functools.partial(nf.token_log_probs, x, t)),
                     ("softmax_entropy", functools.partial(nf.softmax_entropy, x))):
        with pytest.raises(TypeError, match=f"^{op}: temperature must be a real number, got None"):
            call(temperature=None)
    with pytest.raises(TypeError, match=r"^token_log_probs: logits must be float32 or float64"):
        nf.token_log_probs(x.astype(int), t)
    for temperature in (0, -1, np.nan):
        with pytest.raises(ValueError, match="temperature"):
            nf.token_log_probs(x, t, temperature=temperature)
        with pytest.raises(ValueError, match="temperature"):
            nf.softmax_entropy(x, temperature=temperature)


@pytest.mark.parametrize(("dtype", "power"), [(np.float32, -90), (np.float64, -900)])
def test_the_gradient_of_a_small_gradient_is_as_precise(dtype, power):
    small, dx = dtype(2.0) ** power, []
    for scale in (1, small):
        t = nf.Tensor(3 * normal(4, 100, dtype=dtype), requires_grad=True)
        nf.cross_entropy(t, np.arange(4), reduction="sum").backward(np.asarray(scale, dtype))
        dx.append(t.grad)
    np.testing.assert_allclose(dx[1] / small, dx[0], rtol=1e-5, atol=1e-6)
