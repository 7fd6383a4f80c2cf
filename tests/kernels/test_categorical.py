import numpy as np
import pytest

from numformer import _core


def reference(weights, u):
    """The first element at which the running sum of each row exceeds u times its sum."""
    mass = np.cumsum(weights, -1, dtype=np.float64)
    return (mass <= u[:, None] * mass[:, -1:]).sum(-1)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 63, 64, 65, 127, 128, 129, 1000, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chooses_where_the_running_sum_passes_u(n, dtype):
    rng = np.random.default_rng(n)
    weights, u = rng.random((300, n)).astype(dtype), rng.random(300)
    weights[rng.random(weights.shape) < 0.3] = 0
    weights[:, n // 2] += 1e-3
    chosen = _core.categorical(weights, u)
    assert chosen.dtype == np.int64 and chosen.shape == (300,)
    assert (chosen == reference(weights, u)).all()
    assert (weights[np.arange(300), chosen] > 0).all()
    wide = np.full((300, 2 * n + 3), 9, dtype)
    wide[:, 1:n + 1] = weights
    assert (_core.categorical(wide[:, 1:n + 1], u) == chosen).all()                             # rows apart
    assert (_core.categorical(np.asfortranarray(weights), np.repeat(u, 2)[::2]) == chosen).all()
    assert [_core.categorical(w[None], u[i:i + 1])[0] for i, w in enumerate(weights)] == chosen.tolist()


def test_an_element_without_weight_is_never_chosen():
    weights = np.zeros((4, 200), np.float32)
    weights[:, [70, 130]] = 1
    u = np.array([0, 0.4999999999999999, 0.5, np.nextafter(1, 0)])
    assert _core.categorical(weights, u).tolist() == [70, 70, 130, 130]
    third = np.full((1, 150), 1 / 3, np.float32)
    third[:, 140:] = 0
    assert _core.categorical(third, np.array([np.nextafter(1, 0)]))[0] == 139


def test_a_row_of_nan_stays_inside():
    weights = np.ones((2, 70), np.float32)
    weights[0, 69] = np.nan
    assert _core.categorical(weights, np.array([0.9, 0.9])).tolist() == [0, 63]


@pytest.mark.parametrize(("weights", "u", "message"), [
    (np.ones((2, 3)), np.ones(3), r"u must have shape \(2,\)"), (np.ones((2, 0)), np.ones(2), "an element to choose"),
    (np.ones(3), np.ones(1), "weights must"), (np.ones((2, 3), int), np.ones(2), "weights must"),
    (np.ones((2, 3)), np.ones(2, np.float32), "u must")])
def test_bad_arguments_are_named(weights, u, message):
    with pytest.raises((ValueError, TypeError), match=message):
        _core.categorical(weights, u)
