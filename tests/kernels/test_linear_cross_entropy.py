import tracemalloc

import numpy as np
import pytest

import numformer as nf
from numformer.ops import linear_cross_entropy as module
from tests import oracle
from tests.gradients import check_gradients, normal

OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.3, "z_loss": 0.2, "reduction": "sum"},
           {"reduction": "none", "label_smoothing": 0.1}]


def classes(shape, n, ignored=()):
    t = np.random.default_rng(n).integers(0, n, shape)
    t.reshape(-1)[list(ignored)] = -100
    return t


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows to a chunk."""
    monkeypatch.setattr(module, "_LEAST_ROWS", 3)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows, vocabulary, width", [(1, 1, 1), (7, 5, 3), (10, 33, 17), (64, 97, 40)])
def test_it_is_the_cross_entropy_of_the_logits(rows, vocabulary, width, options, small_chunks):
    h, w, t = normal(rows, width), normal(vocabulary, width, seed=1), classes(rows, vocabulary, [0] if rows > 1 else [])
    np.testing.assert_allclose(nf.linear_cross_entropy(h, w, t, **options),
                               oracle.cross_entropy(h @ w.T, t, **options), rtol=1e-12, atol=1e-13)
    single = nf.linear_cross_entropy(h.astype("f"), w.astype("f"), t, **options)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, oracle.cross_entropy(h @ w.T, t, **options), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_match_finite_differences(options, small_chunks):
    t = classes(8, 5, [1, 6])
    check_gradients(lambda h, w: nf.linear_cross_entropy(h, w, t, **options), normal(8, 4), normal(5, 4, seed=1),
                    atol=1e-7)


def test_the_pair_alone_gives_the_gradients_of_the_tape(small_chunks):
    h, w, t = normal(2, 5, 4), normal(7, 4, seed=1), classes((2, 5), 7, [3])
    ours, weight = nf.Tensor(h, requires_grad=True), nf.Tensor(w, requires_grad=True)
    (nf.linear_cross_entropy(ours, weight, t) * 3.0).backward()
    loss, saved = module.linear_cross_entropy_forward(h, w, t)
    dh, dw, _ = module.linear_cross_entropy_backward(3.0, saved)
    assert loss == nf.linear_cross_entropy(h, w, t)
    np.testing.assert_allclose(dh, ours.grad, rtol=1e-13)
    np.testing.assert_allclose(dw, weight.grad, rtol=1e-13)


def test_agrees_with_torch():
    torch = pytest.importorskip("torch")
    h, w = normal(300, 40, dtype=np.float32), normal(5000, 40, seed=1, dtype=np.float32)
    t = classes(300, 5000, [5, 299])
    ours = [nf.Tensor(x, requires_grad=True) for x in (h, w)]
    theirs = [torch.tensor(x, requires_grad=True) for x in (h, w)]
    loss = nf.linear_cross_entropy(*ours, t)
    want = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].T, torch.tensor(t))
    loss.backward(), want.backward()
    np.testing.assert_allclose(loss.item(), want.item(), rtol=1e-6)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=2e-4, atol=1e-7)


def test_ignored_rows_are_not_read():
    h, w, t = normal(6, 4), normal(9, 4, seed=1), classes(6, 9, [1, 4])
    clean = nf.linear_cross_entropy(h, w, t)
    h[[1, 4]] = np.nan
    hidden, weight = nf.Tensor(h, requires_grad=True), nf.Tensor(w, requires_grad=True)
    loss = nf.linear_cross_entropy(hidden, weight, t)
    loss.backward()
    assert loss.item() == clean
    assert (hidden.grad[[1, 4]] == 0).all() and np.isfinite(hidden.grad).all() and np.isfinite(weight.grad).all()
    assert nf.linear_cross_entropy(h, w, np.full(6, -100)) == 0


def test_a_rows_loss_does_not_depend_on_the_others_or_on_threads(threads):
    h, w, t = normal(200, 33, dtype=np.float32), normal(3000, 33, seed=1, dtype=np.float32), classes(200, 3000)
    whole = nf.linear_cross_entropy(h, w, t, reduction="none")
    threads(1)
    assert (nf.linear_cross_entropy(h, w, t, reduction="none") == whole).all()
    assert nf.linear_cross_entropy(h[77:78], w, t[77:78], reduction="none") == whole[77]


@pytest.mark.native
def test_the_logits_are_never_held():
    h, w, t = normal(4096, 8, dtype=np.float32), normal(20000, 8, seed=1, dtype=np.float32), classes(4096, 20000)
    hidden, weight = nf.Tensor(h, requires_grad=True), nf.Tensor(w, requires_grad=True)
    before = nf.memory_stats()["in_use"]
    tracemalloc.start()
    nf.linear_cross_entropy(hidden, weight, t).backward()
    peak = tracemalloc.get_traced_memory()[1] + nf.memory_stats()["in_use_peak"] - before
    tracemalloc.stop()
    assert peak < 4096 * 20000 * 4 / 3


def test_without_features_all_classes_are_alike():
    hidden, weight = (nf.Tensor(np.zeros(shape), requires_grad=True) for shape in ((2, 3, 0), (5, 0)))
    loss = nf.linear_cross_entropy(hidden, weight, np.zeros((2, 3), int))
    loss.backward()
    np.testing.assert_allclose(loss.item(), np.log(5), rtol=1e-12)
    assert hidden.grad.shape == (2, 3, 0) and weight.grad.shape == (5, 0)


def test_bad_arguments_are_named():
    h, w, t = normal(3, 4), normal(5, 4), np.array([0, 1, 2])
    with pytest.raises(ValueError, match=r"hidden must have shape \(\.\.\., K\) .*, got \(3, 4\) and \(4, 5\)"):
        nf.linear_cross_entropy(h, w.T, t)
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\), got \(2,\)"):
        nf.linear_cross_entropy(h, w, t[:2])
    with pytest.raises(ValueError, match="reduction"):
        nf.linear_cross_entropy(h, w, t, reduction="max")
    with pytest.raises(ValueError, match=r"linear_cross_entropy: targets must be within 0 \.\. 4, got 5 at position 2"):
        nf.linear_cross_entropy(h, w, np.array([-100, 1, 5]))       # an ignored row counts
    with pytest.raises(TypeError, match="linear_cross_entropy: targets must be an array of integers, got float64"):
        nf.linear_cross_entropy(h, w, t.astype(float))
    with pytest.raises(ValueError, match=r"linear_cross_entropy: label_smoothing must be within 0 \.\. 1, got 2"):
        nf.linear_cross_entropy(h, w, t, label_smoothing=2)
    with pytest.raises(TypeError, match="must have the same dtype"):
        nf.linear_cross_entropy(h, w.astype("f"), t)
    with pytest.raises(TypeError, match="float32 or float64"):
        nf.linear_cross_entropy(h.astype(int), w, t)
