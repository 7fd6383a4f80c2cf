"""Window, softcap, ALiBi, sinks, key lengths, dropout and the gradient of a mask: alone and together, both ways."""
import functools

import numpy as np
import pytest

import numformer as nf
from numformer.ops.attention import merge_attention_backward, merge_attention_forward
from numformer.ops.attention import scaled_dot_product_attention_backward as attention_backward
from numformer.ops.attention import scaled_dot_product_attention_forward as attention_forward
from tests import oracle
from tests.conftest import COMBINATIONS
from tests.gradients import slope
from tests.kernels.test_attention import arrays, check, sdpa
from tests.kernels.test_attention_backward import upstream

NAMES = ("q", "k", "v", "mask", "slopes", "sinks")


def dropped(p, seed=11):
    """The keywords of a dropout, ours and the oracle's."""
    key = int(np.random.default_rng(seed).bit_generator.random_raw())
    return {"dropout_p": p, "rng": np.random.default_rng(seed)}, {"dropout": p, "dropout_key": key}


def run(q, k, v, dout, dlse, mask=None, slopes=None, sinks=None, **features):
    """(out, lse, gradients by name)."""
    (out, lse), saved = attention_forward(q, k, v, mask, alibi_slopes=slopes, sinks=sinks, return_lse=True, **features)
    return out, lse, dict(zip(NAMES, attention_backward((dout, dlse), saved), strict=True))


def summed(whole, shape):
    """A gradient of (B, H, Sq, Sk), or (B, H), summed to what was broadcast to it."""
    extra = whole.ndim - len(shape)
    whole = whole.sum(axis=tuple(range(extra)))
    return whole.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def random_case(seed, dtype, most=28):
    """Arrays and keywords (ours, the oracle's) of a random combination of features."""
    rng = np.random.default_rng([seed, 5])
    kv_heads, group, batch = rng.integers(1, 3), rng.integers(1, 4), rng.integers(1, 4)
    sq, sk = (int(x) for x in rng.integers(1, most, 2))
    if rng.random() < 0.1:      # more keys than a block of them; than one or two of the groups that are summed apart
        sk += int(rng.choice([120, 120, 120, 1010, 2040]))
    heads = int(kv_heads * group)
    dim, value_dim = int(rng.choice([1, 4, 7, 8, 16, 20])), int(rng.choice([1, 5, 8, 16]))
    q, k, v = arrays(heads, int(kv_heads), sq, sk, dim, value_dim, batch=int(batch), dtype=dtype, seed=seed)
    ours, theirs = {}, {}
    align = str(rng.choice(["bottom_right", "top_left"]))
    if rng.random() < 0.5:
        ours |= {"is_causal": True, "causal_align": align}
        theirs["causal"] = align
    elif rng.random() < 0.3:
        ours["causal_align"] = theirs["align"] = align
    if rng.random() < 0.4:
        ours["window_size"] = theirs["window"] = tuple(int(x) for x in rng.integers(-1, sk + 2, 2))
    if rng.random() < 0.4:
        ours["softcap"] = theirs["softcap"] = float(rng.uniform(0.3, 3))
    if rng.random() < 0.4:
        shape = (batch, heads) if rng.random() < 0.4 else (heads,)
        ours["slopes"] = theirs["slopes"] = rng.uniform(0, 0.3, shape).astype(dtype)
    if rng.random() < 0.4:
        ours["sinks"] = theirs["sinks"] = rng.standard_normal(heads).astype(dtype)
    if rng.random() < 0.4:
        ours["kv_lengths"] = theirs["kv_lengths"] = rng.integers(0, sk + 1, batch)
    if rng.random() < 0.4:
        drop, its = dropped(float(rng.choice([0.1, 0.5])), seed)
        ours |= drop
        theirs |= its
    if rng.random() < 0.6:
        shape = tuple(int(n) if rng.random() < 0.6 else 1 for n in (batch, heads, sq, sk))[rng.integers(0, 5):]
        mask = rng.standard_normal(shape).astype(dtype)
        mask = rng.random(shape) < 0.7 if rng.random() < 0.3 else np.where(rng.random(shape) < 0.1, -np.inf, mask)
        ours["mask"] = theirs["mask"] = np.asarray(mask if np.asarray(mask).dtype == bool else mask.astype(dtype))
    return (q, k, v, upstream(q, v, seed), rng.standard_normal(q.shape[:3]).astype(dtype)), ours, theirs


@functools.lru_cache(maxsize=600)
def expected(seed, dtype):
    (q, k, v, dout, dlse), _, theirs = random_case(seed, dtype)
    return oracle.attention(q, k, v, **theirs), oracle.attention_gradients(q, k, v, dout, dlse, **theirs)


@pytest.mark.parametrize("block", range(COMBINATIONS // 25))
def test_random_combinations_match_the_float64_formula_and_its_gradients(block):
    for seed in range(25 * block, 25 * block + 25):
        dtype = np.float64 if seed % 3 else np.float32
        inputs, ours, _ = random_case(seed, dtype)
        (want_out, want_lse), want = expected(seed, dtype)
        out, lse, got = run(*inputs, **ours)
        near = {"rtol": 1e-10, "atol": 1e-11} if dtype == np.float64 else {"rtol": 2e-4, "atol": 3e-5}
        message = f"seed {seed}, {dtype.__name__}, {sorted(ours)}"
        np.testing.assert_allclose(out, want_out, err_msg=message, **near)
        np.testing.assert_allclose(lse, want_lse, err_msg=message, **near)
        for name in NAMES:
            given = {"q": inputs[0], "k": inputs[1], "v": inputs[2]}.get(name, ours.get(name))
            if given is None or given.dtype == bool:
                assert got[name] is None
                continue
            whole = want[name].sum(axis=0) if name == "slopes" and given.ndim == 1 else want[name]
            assert got[name].dtype == dtype
            scale = max(1, np.abs(whole).max())
            np.testing.assert_allclose(got[name], summed(whole, given.shape), rtol=near["rtol"],
                                       atol=near["atol"] * scale, err_msg=f"{message}: {name}")


def small(name):
    """A float64 case with one feature, for finite differences: arrays by name, keywords."""
    q, k, v = arrays(4, 2, 5, 7, 4, 3, batch=2, dtype=np.float64)
    rng = np.random.default_rng(1)
    sides = {"mask": rng.standard_normal((4, 1, 7)), "slopes": rng.uniform(0, 0.5, 4), "sinks": rng.standard_normal(4)}
    plain = {"window": {"window_size": (2, 1)}, "softcap": {"softcap": 1.5}, "causal": {"is_causal": True},
             "lengths": {"kv_lengths": np.array([3, 7])}}
    if name == "all":
        keywords = {key: x for entry in plain.values() for key, x in entry.items()}
    else:
        sides, keywords = {key: x for key, x in sides.items() if key == name}, plain.get(name, {})
    return {"q": q, "k": k, "v": v, **sides}, keywords


@pytest.mark.native
@pytest.mark.parametrize("name", ["window", "softcap", "slopes", "sinks", "lengths", "mask", "all"])
def test_gradients_match_finite_differences(name):
    tensors, keywords = small(name)
    dout, dlse = upstream(tensors["q"], tensors["v"]), np.random.default_rng(2).standard_normal((2, 4, 5))

    def loss(**changed):
        out, lse, _ = run(**{**tensors, **changed}, dout=dout, dlse=dlse, **keywords)
        return out, np.where(np.isinf(lse), 0, lse)

    got = run(**tensors, dout=dout, dlse=dlse, **keywords)[2]
    for which, x in tensors.items():
        want = slope(lambda: loss()[0], x, dout) + slope(lambda: loss()[1], x, dlse)
        np.testing.assert_allclose(got[which], want, rtol=1e-6, atol=1e-8, err_msg=which)


def test_the_tape_gives_every_gradient():
    tensors, keywords = small("all")
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    dout, dlse = upstream(tensors["q"], tensors["v"]), np.random.default_rng(2).standard_normal((2, 4, 5), np.float32)
    want = run(**tensors, dout=dout, dlse=dlse, **keywords)[2]
    leaves = {name: nf.Tensor(x, requires_grad=True) for name, x in tensors.items()}
    q, k, v, mask, slopes, sinks = leaves.values()
    out, lse = sdpa(q, k, v, mask, alibi_slopes=slopes, sinks=sinks, return_lse=True, **keywords)
    ((out * dout).sum() + (lse * dlse).sum()).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad == want[name]).all(), name
    mask.grad = None
    sdpa(*(x.data for x in (q, k, v)), mask).sum().backward()
    assert mask.grad.shape == mask.shape and sinks.grad is not None


def test_a_mask_that_is_broadcast_by_its_strides_gets_the_gradient_of_each_of_its_elements():
    q, k, v = arrays(4, 4, 5, 9, 8, batch=2)
    one_a_key = np.random.default_rng(3).standard_normal((2, 1, 1, 9), np.float32)
    for shape in ((2, 1, 5, 9), (2, 4, 5, 9)):
        gradients = []
        for mask in (np.broadcast_to(one_a_key, shape), np.ascontiguousarray(np.broadcast_to(one_a_key, shape))):
            out, saved = attention_forward(q, k, v, mask)
            gradients.append(attention_backward(out, saved)[3])
        assert gradients[0].shape == shape and (gradients[0] == gradients[1]).all()


def test_one_element_of_a_window_is_the_value_itself_and_causality_closes_its_right():
    q, k, v = arrays(2, 2, 20, 20, 8)
    np.testing.assert_allclose(sdpa(q, k, v, window_size=(0, 0)), v, rtol=1e-6)
    assert (sdpa(q, k, v, window_size=(-1, 0)) == sdpa(q, k, v, is_causal=True)).all()
    assert (sdpa(q, k, v, window_size=(3, 5), is_causal=True) == sdpa(q, k, v, window_size=(3, 0))).all()
    for wide in (2**62, 2**70):
        assert (sdpa(q, k, v, window_size=(30, wide)) == sdpa(q, k, v, window_size=(wide, 30))).all()
        assert (sdpa(q, k, v, window_size=(30, wide)) == sdpa(q, k, v)).all()


@pytest.mark.parametrize("sq, sk, left, right", [(300, 300, 40, 0), (130, 300, 17, 20), (300, 130, 200, 9),
                                                 (9, 500, 130, 0)])
def test_windows_across_tiles(sq, sk, left, right):
    q, k, v = arrays(2, 1, sq, sk, 16)
    dout = upstream(q, v)
    for align in ("bottom_right", "top_left"):
        theirs = {"window": (left, right), "align": align}
        out, saved = attention_forward(q, k, v, window_size=(left, right), causal_align=align)
        check(out, oracle.attention(q, k, v, **theirs)[0], np.float32)
        want = oracle.attention_gradients(q, k, v, dout, **theirs)
        for got, name in zip(attention_backward(dout, saved), "qkv"):
            np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_softcap_out_of_reach_changes_nothing(dtype):
    q, k, v = arrays(2, 2, 20, 20, 8, dtype=dtype)
    for softcap in (1e20, np.finfo(dtype).max / 1e10, np.finfo(dtype).max, 1e300):
        np.testing.assert_allclose(sdpa(q, k, v, softcap=softcap), sdpa(q, k, v), rtol=1e-5, atol=1e-6)


def test_lengths_of_any_integer_type():
    q, k, v = arrays(2, 2, 3, 9, 8, batch=2)
    for dtype in (np.uint8, np.uint64):
        assert (sdpa(q, k, v, kv_lengths=np.array([2, 9], dtype)) == sdpa(q, k, v, kv_lengths=[2, 9])).all()
    with pytest.raises(ValueError, match="kv_lengths must lie between"):
        sdpa(q, k, v, kv_lengths=np.array([2, 2**64 - 1], np.uint64))


def test_alibi_slopes_are_the_papers():
    assert (nf.alibi_slopes(8) == 2.0 ** -np.arange(1.0, 9)).all()
    np.testing.assert_allclose(nf.alibi_slopes(12), [*(2.0 ** -np.arange(1.0, 9)), *(2.0 ** -np.arange(0.5, 4))],
                               rtol=1e-6)
    np.testing.assert_allclose(nf.alibi_slopes(1), [2.0**-8])
    assert nf.alibi_slopes(6).dtype == np.float32 and len(nf.alibi_slopes(6)) == 6
    with pytest.raises(ValueError, match="at least 1"):
        nf.alibi_slopes(0)
    for wrong in (2.5, "8", None):
        with pytest.raises(TypeError, match="alibi_slopes: num_heads must be an integer, got "):
            nf.alibi_slopes(wrong)


def test_dropout_divides_the_kept_weights_and_leaves_lse():
    q, k, _ = arrays(2, 1, 70, 140, 8)
    eye = np.broadcast_to(np.eye(140, dtype=np.float32), (1, 1, 140, 140))
    weights, lse = sdpa(q, k, eye, return_lse=True)
    drop, its = dropped(0.25)
    got, dropped_lse = sdpa(q, k, eye, return_lse=True, **drop)
    assert (lse == dropped_lse).all()
    kept = got != 0
    np.testing.assert_allclose(got[kept], weights[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.01
    check(got, oracle.attention(q, k, eye, **its)[0], np.float32)


def test_a_dropout_is_one_draw_and_the_same_for_every_dtype():
    q, k, v = arrays(2, 1, 30, 40, 8)
    rng, other = np.random.default_rng(3), np.random.default_rng(3)
    first, second = (sdpa(q, k, v, dropout_p=0.5, rng=rng) for _ in range(2))
    other.bit_generator.random_raw(2)
    assert rng.random() == other.random() and (first != second).any()
    double = sdpa(*(x.astype(float) for x in (q, k, v)), dropout_p=0.5, rng=np.random.default_rng(3))
    np.testing.assert_allclose(first, double, rtol=2e-4, atol=1e-5)
    assert (sdpa(q, k, v, dropout_p=0.0, rng=rng) == sdpa(q, k, v)).all()


def test_merged_parts_are_the_whole():
    q, k, v = arrays(4, 2, 9, 60, 16, dtype=np.float64)
    whole, whole_lse = sdpa(q, k, v, return_lse=True)
    parts = [sdpa(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 20), slice(20, 60))]
    out, lse = nf.merge_attention(*parts[0], *parts[1])
    np.testing.assert_allclose(out, whole, rtol=1e-12)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-12)
    nothing = np.full_like(whole, np.nan), np.full_like(whole_lse, -np.inf)
    for merged in (nf.merge_attention(*parts[0], *nothing), nf.merge_attention(*nothing, *parts[0])):
        assert (merged[0] == parts[0][0]).all() and (merged[1] == parts[0][1]).all()
    for neither in (nf.merge_attention(*nothing, np.ones_like(whole), nothing[1]),
                    nf.merge_attention(np.ones_like(whole), nothing[1], *nothing)):
        assert (neither[0] == 0).all() and (neither[1] == -np.inf).all()
    odd = np.full_like(whole_lse, np.nan)       # NaN is no part without weight
    assert np.isnan(nf.merge_attention(parts[0][0], odd, *parts[1])[0]).all()
    nothing[0][...] = np.inf
    with np.errstate(all="raise"):
        leaves = [nf.Tensor(x, requires_grad=True) for x in (*parts[0], *nothing)]
        out, lse = nf.merge_attention(*leaves)
        (out.sum() + lse.sum()).backward()
    assert (out.data == parts[0][0]).all() and (leaves[2].grad == 0).all() and (leaves[0].grad == 1).all()
    dy = np.full_like(whole, np.nan), np.full_like(whole_lse, np.nan)
    saved = merge_attention_forward(*nothing, *nothing)[1]
    assert all((gradient == 0).all() for gradient in merge_attention_backward(dy, saved))
    with pytest.raises(ValueError, match="merge_attention"):
        nf.merge_attention(out, lse[..., :-1], out, lse)
    whole, sums = np.ones((1, 2, 3, 4)), np.ones((1, 2, 3))
    for wrong in ((whole.astype(int), sums, whole.astype(int), sums), (whole, sums, whole.astype(np.float32), sums)):
        with pytest.raises(TypeError, match="merge_attention: out_a and out_b must be floats of one dtype, got "):
            nf.merge_attention(*wrong)
    with pytest.raises(TypeError, match="merge_attention: lse_a and lse_b must be floats of one dtype, got "):
        nf.merge_attention(whole, sums, whole, sums.astype(np.float32))


def test_gradients_through_merged_parts_are_those_of_the_whole():
    x = arrays(2, 1, 5, 30, 8, dtype=np.float64)
    dout, dlse = upstream(x[0], x[2]), np.random.default_rng(0).standard_normal((1, 2, 5))
    results = []
    for merge in (False, True):
        q, k, v = leaves = [nf.Tensor(a, requires_grad=True) for a in x]
        out, lse = sdpa(q, k, v, return_lse=True)
        if merge:
            out, lse = nf.merge_attention(*sdpa(q, k[:, :, :11], v[:, :, :11], return_lse=True),
                                          *sdpa(q, k[:, :, 11:], v[:, :, 11:], return_lse=True))
        ((out * dout).sum() + (lse * dlse).sum()).backward()
        results.append([leaf.grad for leaf in leaves])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("record", [False, True])
def test_a_window_may_come_as_an_array_or_a_list(record):
    q, k, v = (nf.Tensor(x, requires_grad=True) if record else x for x in arrays(4, 2, 3, 5, 8))
    for window in (np.array([1, 0]), [1, 0]):
        y, expected = sdpa(q, k, v, window_size=window), sdpa(q, k, v, window_size=(1, 0))
        np.testing.assert_array_equal(*((y.data, expected.data) if record else (y, expected)))


@pytest.mark.parametrize("keywords, error, message", [
    ({"window_size": (1, 2, 3)}, ValueError, "window_size must be two"),
    ({"window_size": 4}, ValueError, "window_size must be two"),
    ({"window_size": (-2, 0)}, ValueError, "window_size must be two"),
    ({"window_size": (1.5, 0)}, TypeError, "attention: each side of window_size must be an integer, got 1.5"),
    ({"window_size": (None, 0)}, TypeError, "attention: each side of window_size must be an integer, got None"),
    ({"softcap": "none"}, TypeError, "attention: softcap must be a real number, got 'none'"),
    ({"softcap": np.ones(2)}, TypeError, "attention: softcap must be a real number, got array"),
    ({"scale": np.ones(2)}, TypeError, "attention: scale must be a real number, got array"),
    ({"scale": nf.Tensor(1.0, requires_grad=True)}, TypeError, "scale must be .* has no gradient, got a Tensor that"),
    ({"softcap": nf.Tensor(1.0, requires_grad=True)}, TypeError, "softcap must be .* has no gradient, got a Tensor"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and not negative"),
    ({"softcap": np.inf}, ValueError, "softcap must be finite and not negative"),
    ({"dropout_p": 1.0, "rng": np.random.default_rng(0)}, ValueError, "dropout_p must be at least 0 and below 1"),
    ({"dropout_p": 1.0}, ValueError, "attention: dropout_p must be at least 0 and below 1, got 1.0"),
    ({"dropout_p": "a"}, TypeError, "attention: dropout_p must be a real number, got 'a'"),
    ({"dropout_p": np.zeros(2)}, TypeError, "attention: dropout_p must be a real number, got array"),
    ({"dropout_p": 0.5}, TypeError, "rng must be a numpy.random.Generator"),
    ({"causal_align": ["top_left"]}, ValueError, "attention: causal_align must be"),
    ({"alibi_slopes": np.ones(3, np.float32)}, ValueError, "alibi_slopes must have shape"),
    ({"alibi_slopes": np.ones((1, 4), np.float32)}, ValueError, "alibi_slopes must have shape"),
    ({"alibi_slopes": np.ones(4)}, TypeError, "alibi_slopes must be float32"),
    ({"sinks": np.ones((2, 4), np.float32)}, ValueError, "sinks must have shape"),
    ({"kv_lengths": np.array([1, 6])}, ValueError, "kv_lengths must lie between 0 and Sk = 5, got 6"),
    ({"kv_lengths": [1, -1]}, ValueError, "kv_lengths must lie between"),
    ({"kv_lengths": [1]}, ValueError, "kv_lengths must have shape"),
    ({"kv_lengths": [1.5, 2]}, TypeError, "kv_lengths must be integers"),
])
def test_wrong_keywords_are_named_in_the_error(keywords, error, message):
    q, k, v = arrays(4, 2, 3, 5, 8, batch=2)
    with pytest.raises(error, match=message):
        sdpa(q, k, v, **keywords)
