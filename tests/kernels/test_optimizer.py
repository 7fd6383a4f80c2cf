import numpy as np
import pytest

from numformer.ops.optimizer import adamw_step, global_norm

SHAPES = [(0,), (1,), (3,), (17,), (33, 5), (16384,), (16385,), (129, 257)]
HYPER = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-8)


def arrays(dtype, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(shape)).astype(dtype) for shape in SHAPES]


def reference(p, g, m, v, *, lr, betas, eps, weight_decay, step, grad_scale):
    g = g * grad_scale
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    update = (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
    return p - lr * weight_decay * p - lr * update, m, v


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_follow_the_formula(dtype):
    p, m, v = arrays(dtype, 0), arrays(dtype, 1, 0), arrays(dtype, 2, 0)
    decays = [0.1 * i for i in range(len(p))]
    want = [[x.astype(float) for x in xs] for xs in (p, m, v)]
    for step in (1, 2, 3):
        g = arrays(dtype, 2 + step)
        adamw_step(p, g, m, v, weight_decay=decays, step=step, grad_scale=0.5, **HYPER)
        for i, gradient in enumerate(g):
            new = reference(want[0][i], gradient.astype(float), want[1][i], want[2][i], weight_decay=decays[i],
                            step=step, grad_scale=0.5, **HYPER)
            for k in range(3):
                want[k][i] = new[k]
    tolerance = dict(rtol=2e-5, atol=1e-7) if dtype == np.float32 else dict(rtol=1e-12, atol=1e-15)
    for got, expected in zip((p, m, v), want):
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, **tolerance)


def test_it_is_torchs_adamw():
    torch = pytest.importorskip("torch")
    p, m, v = arrays(np.float32, 0), arrays(np.float32, 1, 0), arrays(np.float32, 2, 0)
    theirs = [torch.tensor(x, requires_grad=True) for x in p]
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for step in (1, 2, 3):
        g = arrays(np.float32, 2 + step)
        for x, gradient in zip(theirs, g):
            x.grad = torch.tensor(gradient)
        adamw.step()
        adamw_step(p, g, m, v, weight_decay=0.1, step=step, **HYPER)
    for a, b in zip(p, theirs):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_bits_do_not_depend_on_threads_or_company(threads):
    def run(select):
        p, g, m, v = (arrays(np.float32, seed) for seed in range(4))
        v = [abs(x) for x in v]
        p, g, m, v = ([xs[i] for i in select] for xs in (p, g, m, v))
        adamw_step(p, g, m, v, weight_decay=0.1, step=2, **HYPER)
        return p
    everything = range(len(SHAPES))
    whole, norm = run(everything), global_norm(arrays(np.float32, 0))
    threads(1)
    assert all((a == b).all() for a, b in zip(whole, run(everything)))
    assert (run([6])[0] == whole[6]).all()
    assert global_norm(arrays(np.float32, 0)) == norm


def test_gradients_may_be_views_and_read_only():
    g = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    g.flags.writeable = False
    results = []
    for gradient in (g[::2, ::3], np.ascontiguousarray(g[::2, ::3])):
        p, m, v = (np.zeros((15, 14), np.float32) for _ in range(3))
        adamw_step([p], [gradient], [m], [v], step=1, **HYPER)
        results.append(p)
    assert (results[0] == results[1]).all()
    assert global_norm([g[::2, ::3]]) == global_norm([np.ascontiguousarray(g[::2, ::3])])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_global_norm_is_that_of_all_elements(dtype):
    x = arrays(dtype, 5)
    want = np.sqrt(sum((a.astype(float) ** 2).sum() for a in x))
    np.testing.assert_allclose(global_norm(x), want, rtol=1e-13)
    assert global_norm([]) == 0
    big = np.full(100, 1e30, np.float32)
    np.testing.assert_allclose(global_norm([big]), 1e31, rtol=1e-6)
    assert np.isnan(global_norm([np.array([1, np.nan], dtype)]))


def test_bad_arguments_are_refused_and_change_nothing():
    def fresh():
        return [np.ones(4, np.float32)], [np.ones(4, np.float32)], [np.zeros(4, np.float32)], [np.zeros(4, np.float32)]
    p, g, m, v = fresh()
    for error, match, change in [
        (ValueError, "step counts from 1", dict(step=0)),
        (ValueError, "one entry a parameter", dict(g=[])),
        (TypeError, "got None", dict(g=[None])),
        (TypeError, "float32", dict(m=[np.zeros(4)])),
        (TypeError, "float32 or float64", dict(g=[np.zeros(4, np.int32)])),
        (ValueError, "shape", dict(v=[np.zeros(5, np.float32)])),
        (ValueError, "C-contiguous", dict(m=[np.zeros(8, np.float32)[::2]])),
        (TypeError, "array", dict(v=[[0, 0, 0, 0]])),
    ]:
        a = {"p": p, "g": g, "m": m, "v": v, "step": 1, **change}
        with pytest.raises(error, match=match):
            adamw_step(a["p"], a["g"], a["m"], a["v"], step=a["step"], **HYPER)
    frozen = np.ones(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        adamw_step([frozen], g, m, v, step=1, **HYPER)
    with pytest.raises(TypeError, match="global_norm: expected a list of arrays"):
        global_norm(3)
    assert (p[0] == 1).all() and (m[0] == 0).all() and (v[0] == 0).all()
