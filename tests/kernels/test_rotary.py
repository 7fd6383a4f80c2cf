import numpy as np
import pytest

import numformer as nf
from tests import oracle
from tests.gradients import check_gradients, normal


def angles(length, half, dtype=np.float64):
    a = np.outer(np.arange(length), 10000.0 ** (-np.arange(half) / max(half, 1)))
    return np.cos(a).astype(dtype), np.sin(a).astype(dtype)


@pytest.mark.parametrize("dim", [2, 4, 16, 30, 32, 34, 62, 64, 66, 80, 128])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype, atol", [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_matches_complex_multiplication(dim, interleaved, dtype, atol):
    x, (cos, sin) = normal(2, 3, 5, dim, dtype=dtype), angles(5, dim // 2, dtype)
    y = nf.rotary_embedding(x, cos, sin, interleaved=interleaved)
    np.testing.assert_allclose(y, oracle.rotary(x, cos, sin, interleaved), atol=atol)
    assert y.dtype == dtype and y.flags.c_contiguous


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 2, 10, 34, 40])
def test_a_part_of_the_row_may_be_turned(rotary_dim, interleaved):
    x, (cos, sin) = normal(2, 3, 5, 40), angles(5, rotary_dim // 2)
    y = nf.rotary_embedding(x, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim)
    want = oracle.rotary(x[..., :rotary_dim], cos, sin, interleaved)
    np.testing.assert_allclose(y[..., :rotary_dim], want, atol=1e-14)
    assert (y[..., rotary_dim:] == x[..., rotary_dim:]).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_may_come_twice_as_hugging_face_gives_them(interleaved):
    x, (cos, sin) = normal(2, 3, 5, 12), angles(5, 6)
    twice = (lambda a: np.repeat(a, 2, -1)) if interleaved else (lambda a: np.concatenate([a, a], -1))
    want = nf.rotary_embedding(x, cos, sin, interleaved=interleaved)
    assert (nf.rotary_embedding(x, twice(cos), twice(sin), interleaved=interleaved) == want).all()


def test_angles_broadcast_so_that_each_sequence_has_its_own_positions():
    x, (cos, sin) = normal(3, 2, 1, 8), angles(3, 4)
    y = nf.rotary_embedding(x, cos[:, None, None], sin[:, None, None])
    for b in range(3):
        assert (y[b] == nf.rotary_embedding(x[b], cos[b : b + 1], sin[b : b + 1])).all()


def test_two_and_three_axes_are_read_as_four():
    x, (cos, sin) = normal(3, 5, 8), angles(5, 4)
    assert (nf.rotary_embedding(x, cos, sin) == nf.rotary_embedding(x[None], cos, sin)[0]).all()
    assert (nf.rotary_embedding(x[1], cos, sin) == nf.rotary_embedding(x, cos, sin)[1]).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4])
def test_gradients_match_finite_differences(interleaved, rotary_dim):
    cos, sin = angles(3, (rotary_dim or 6) // 2)
    check_gradients(lambda x: nf.rotary_embedding(x, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim),
                    normal(2, 3, 6))


def test_views_of_fused_queries_keys_and_values_are_read_in_place(threads):
    qkv, (cos, sin) = normal(2, 70, 3, 4, 32, dtype=np.float32), angles(70, 16, np.float32)
    for i in range(3):
        view = qkv[:, :, i].transpose(0, 2, 1, 3)
        y = nf.rotary_embedding(view, cos, sin)
        assert y.flags.c_contiguous and (y == nf.rotary_embedding(view.copy(), cos, sin)).all()
        threads(1)
        assert (y == nf.rotary_embedding(view, cos, sin)).all()
        threads(2)
    odd = normal(2, 4, 5, 64, dtype=np.float32)[..., ::2]
    cos, sin = cos[:5], sin[:5]
    assert (nf.rotary_embedding(odd, cos, sin) == nf.rotary_embedding(odd.copy(), cos, sin)).all()
    assert (nf.rotary_embedding(odd[:, :, ::-1], cos, sin)
            == nf.rotary_embedding(odd[:, :, ::-1].copy(), cos, sin)).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_out_may_be_x_itself_whatever_its_strides(interleaved):
    whole, (cos, sin) = normal(2, 5, 7, 12), angles(5, 4)
    x = whole.transpose(0, 2, 1, 3)[:, 1:4]
    want, rest = nf.rotary_embedding(x, cos, sin, interleaved=interleaved, rotary_dim=8), whole.copy()
    assert nf.rotary_embedding(x, cos, sin, interleaved=interleaved, rotary_dim=8, out=x) is x
    assert (x == want).all()
    rest[:, :, 1:4] = whole[:, :, 1:4]
    assert (whole == rest).all()


def test_out_is_written_and_must_not_share_memory():
    x, (cos, sin) = normal(1, 3, 5, 8)[:, :2], angles(5, 4)
    out = np.empty_like(x)
    assert nf.rotary_embedding(x, cos, sin, out=out) is out
    assert (out == nf.rotary_embedding(x, cos, sin)).all()
    with pytest.raises(ValueError, match="share memory"):
        nf.rotary_embedding(x, cos, sin, out=x.base[:, 1:])
    with pytest.raises(ValueError, match="out must have shape"):
        nf.rotary_embedding(x, cos, sin, out=out[0])
    with pytest.raises(TypeError, match="out must be float64"):
        nf.rotary_embedding(x, cos, sin, out=out.astype(np.float32))


def test_empty_arrays_give_empty_results():
    for shape in ((0, 2, 5, 8), (2, 3, 0, 8), (5, 0)):
        cos, sin = angles(shape[-2], shape[-1] // 2)
        assert nf.rotary_embedding(np.zeros(shape), cos, sin).shape == shape


def test_bad_inputs_are_named():
    x, (cos, sin) = np.zeros((2, 3, 5, 8)), angles(5, 4)
    with pytest.raises(ValueError, match=r"cos must have shape \(S, 4\)"):
        nf.rotary_embedding(x, cos[:4], sin)
    with pytest.raises(ValueError, match=r"sin must have shape \(S, 4\)"):
        nf.rotary_embedding(x, cos, sin[:, :3])
    for bad in (3, 10, -2):
        with pytest.raises(ValueError, match="rotary_dim must be even"):
            nf.rotary_embedding(x, cos, sin, rotary_dim=bad)
    with pytest.raises(TypeError, match="rotary_dim must be an integer"):
        nf.rotary_embedding(x, cos, sin, rotary_dim=4.0)
    with pytest.raises(ValueError, match="x must have shape"):
        nf.rotary_embedding(x[None], cos, sin)
    with pytest.raises(TypeError, match="cos must be float64"):
        nf.rotary_embedding(x, cos.astype(np.float32), sin)
    with pytest.raises(TypeError, match="float32 or float64"):
        nf.rotary_embedding(x.astype(int), cos, sin)
    with pytest.raises(ValueError, match=r"x must have shape .* got 0 dimensions"):
        nf.rotary_embedding(np.zeros(()), cos, sin)
