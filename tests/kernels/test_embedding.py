import numpy as np
import pytest

import numformer as nf
from numformer.ops.embedding import embedding_backward, embedding_forward
from tests.gradients import check_gradients, normal


@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 17, 33, 64, 97])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gathers_rows_and_adds_their_gradients(width, dtype):
    w = normal(11, width, dtype=dtype)
    ids = np.random.default_rng(width).integers(0, 11, (4, 9))
    y, saved = embedding_forward(ids, w)
    assert (y == w[ids]).all() and y.dtype == dtype
    dy = normal(4, 9, width, dtype=dtype)
    want = np.zeros(w.shape, dtype)
    for t, d in zip(ids.ravel(), dy.reshape(36, width)):
        want[t] += d
    assert (embedding_backward(dy, saved)[1] == want).all()     # to the last bit: the order is the ids' own
    one = np.broadcast_to(dy[:1, :1], dy.shape)
    assert (embedding_backward(one, saved)[1] == embedding_backward(one.copy(), saved)[1]).all()


def test_gradients_match_finite_differences():
    ids = np.array([2, 0, 2, 2])
    check_gradients(lambda w: nf.embedding(ids, w), normal(4, 3))


def test_bits_do_not_depend_on_threads(threads):
    w, ids = normal(300, 65, dtype=np.float32), np.random.default_rng(0).integers(0, 20, 2000)
    dy = normal(2000, 65, dtype=np.float32)
    _, saved = embedding_forward(ids, w)
    whole = embedding_backward(dy, saved)[1]
    threads(1)
    assert (embedding_backward(dy, saved)[1] == whole).all()


def test_ids_and_table_may_have_any_type_and_strides():
    w = normal(10, 8)
    for kind in (np.int8, np.uint16, np.int32, np.uint64):
        ids = np.array([[9, 0], [3, 3]], kind)
        assert (nf.embedding(ids, w) == w[ids]).all()
        assert (nf.embedding(ids.T, w[::-1]) == w[::-1][ids.T]).all()
        assert (nf.embedding(ids, w[:, ::2]) == w[:, ::2][ids]).all()
    assert (nf.embedding([1, 2], w) == w[1:3]).all()
    assert (nf.embedding(np.array(3), w) == w[3]).all()


def test_empty_ids():
    assert nf.embedding(np.zeros((2, 0), int), normal(3, 4)).shape == (2, 0, 4)
    assert nf.embedding(np.zeros(0, int), np.zeros((0, 4))).shape == (0, 4)
    assert (embedding_backward(np.zeros((0, 4)), (np.zeros(0, int), 3))[1] == np.zeros((3, 4))).all()


def test_bad_inputs_are_named():
    w = normal(5, 2)
    for bad in (5, -1, 2**40):
        with pytest.raises(ValueError, match=rf"ids must be within 0 .. 4, got {bad} at position 2"):
            nf.embedding(np.array([[0, 1], [bad, 9]]), w)
    with pytest.raises(ValueError, match="weight must have rows, got an empty table"):
        nf.embedding(np.zeros(1, int), np.zeros((0, 4)))
    with pytest.raises(TypeError, match="integers"):
        nf.embedding(np.zeros(2), w)
    with pytest.raises(TypeError, match="integers"):
        nf.embedding(np.zeros(2, bool), w)
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        nf.embedding(np.zeros(2, int), w[0])
    with pytest.raises(TypeError, match="float32 or float64"):
        nf.embedding(np.zeros(2, int), w.astype(int))
