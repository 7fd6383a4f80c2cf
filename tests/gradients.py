"""Slopes by finite differences, and the numbers that tests of gradients run on."""
import numpy as np

import numformer as nf


def normal(*shape, dtype=np.float64, seed=0):
    """Standard normal numbers that depend on the shape and seed alone."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def slope(f, x, dy, step=1e-5):
    """d(sum(f() * dy))/dx by central differences; f reads x, which is changed in place."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        before = x[i]
        x[i] = before + step
        high = (f() * dy).sum()
        x[i] = before - step
        gradient[i] = (high - (f() * dy).sum()) / (2 * step)
        x[i] = before
    return gradient


def check_gradients(op, *arrays, rtol=1e-6, atol=1e-8):
    """The gradients of op(*arrays), float64, against finite differences, weighted by random dy."""
    tensors = [nf.Tensor(x, requires_grad=True) for x in arrays]
    y = op(*tensors)
    dy = normal(*y.shape, seed=9)
    y.backward(dy)
    for t, x in zip(tensors, arrays):
        np.testing.assert_allclose(t.grad, slope(lambda: op(*arrays), x, dy), rtol=rtol, atol=atol)
