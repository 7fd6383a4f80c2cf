"""The bits of attention depend on the input alone."""
import numpy as np
import pytest

from tests.kernels.test_attention import arrays, sdpa
from tests.kernels.test_attention_backward import gradients, upstream


@pytest.mark.parametrize("causal", [False, True])
def test_one_thread_and_more_give_the_same_bits(threads, causal):
    q, k, v = arrays(4, 2, 300, 300, 40)
    dout = upstream(q, v)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append([sdpa(q, k, v, is_causal=causal), *gradients(q, k, v, dout, causal=int(causal))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a == b).all()


def test_alone_or_in_a_batch_the_bits_are_the_same():
    q, k, v = arrays(4, 2, 50, 70, 16, batch=3)
    dout = upstream(q, v)
    whole = [sdpa(q, k, v), *gradients(q, k, v, dout)]
    for b in range(3):
        one = slice(b, b + 1)
        alone = [sdpa(q[one], k[one], v[one]), *gradients(q[one], k[one], v[one], dout[one])]
        for a, w in zip(alone, whole, strict=True):
            assert (a == w[one]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("features", [{}, {"is_causal": True}, {"window_size": (30, 10)}, {"kv_lengths": [170, 61]}])
def test_however_many_queries_a_task_has_the_bits_are_the_same(features, dtype):
    """One head of one sequence is cut into more tasks than many."""
    q, k, v = (x.astype(dtype) for x in arrays(12, 4, 210, 170, 24, batch=2))
    whole = sdpa(q, k, v, **features)
    for b, head in ((0, 0), (1, 7)):
        one, few = slice(b, b + 1), dict(features)
        if "kv_lengths" in few:
            few["kv_lengths"] = few["kv_lengths"][one]
        alone = sdpa(q[one, head:head + 1], k[one, head // 3:head // 3 + 1], v[one, head // 3:head // 3 + 1], **few)
        assert (alone == whole[one, head:head + 1]).all()


@pytest.mark.parametrize("dim, value_dim", [(32, 32), (64, 64), (40, 24), (7, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_cached_step_has_the_bits_of_the_full_forward(dim, value_dim, dtype, threads):
    q, k, v = arrays(4, 2, 290, 290, dim, value_dim, dtype=dtype)
    full, full_lse = sdpa(q, k, v, is_causal=True, return_lse=True)
    for n in (1, 2, 16, 127, 128, 129, 130, 255, 290):
        for step in (1, 2, 3, 5):
            if step <= n:
                rows = slice(n - step, n)
                out, lse = sdpa(q[:, :, rows], k[:, :, :n], v[:, :, :n], is_causal=True, return_lse=True)
                assert (out == full[:, :, rows]).all() and (lse == full_lse[:, :, rows]).all()
    threads(1)
    assert (sdpa(q[:, :, -1:], k, v) == full[:, :, -1:]).all()


@pytest.mark.parametrize("window", [(-1, -1), (1100, 0), (40, -1)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (6, 3)])
def test_thousands_of_keys_have_the_same_bits_in_any_cut_of_the_work(heads, kv_heads, window, threads):
    """Keys are summed in groups of 1024, which tasks of decode share where heads are few."""
    sq, sk = 40, 3500
    q, k, v = arrays(heads, kv_heads, sq, sk, 16, batch=2)
    features = {"is_causal": True, "window_size": window, "kv_lengths": [sk, 2060], "return_lse": True}
    full, full_lse = sdpa(q, k, v, **features)
    for n in (1, 2, 3):
        threads(n)
        for step in (1, 7):
            out, lse = sdpa(q[:, :, -step:], k, v, **features)
            assert (out == full[:, :, -step:]).all() and (lse == full_lse[:, :, -step:]).all()
    for n in (1023, 1024, 1025, 2048, 3001):
        out, lse = sdpa(q[:, :, :1], k[:, :, :n], v[:, :, :n], is_causal=True, window_size=window, return_lse=True)
        whole, whole_lse = sdpa(q, k[:, :, :n + sq - 1], v[:, :, :n + sq - 1], is_causal=True, window_size=window,
                                return_lse=True)
        assert (out[:, :, 0] == whole[:, :, 0]).all() and (lse[:, :, 0] == whole_lse[:, :, 0]).all()


@pytest.mark.parametrize("keys, kv_heads, dim", [(70, 2, 40), (1100, 8, 128), (2100, 4, 256)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_cache_with_its_heads_side_by_side_gives_the_same_bits(keys, kv_heads, dim, dtype, threads):
    """Such heads share tasks; rows of the longer caches lie a multiple of 4 KB apart."""
    q, k, v = (x.astype(dtype) for x in arrays(2 * kv_heads, kv_heads, 1, keys, dim, batch=2))
    apart = sdpa(q, k, v)
    k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
    for n in (1, 2):
        threads(n)
        assert (sdpa(q, k, v) == apart).all()


@pytest.mark.parametrize("queries", [1, 30])
def test_not_a_number_in_one_group_of_keys_stays_with_the_rows_that_see_it(queries):
    q, k, v = arrays(2, 1, queries, 3000, 16)
    clean = sdpa(q, k, v, window_size=(800, 0))
    v[:, :, 100], k[:, :, 200] = np.nan, np.nan
    assert (sdpa(q, k, v, window_size=(800, 0)) == clean).all()
    v[:, :, -1, 3] = np.nan
    out = sdpa(q, k, v, window_size=(800, 0))
    seen = np.zeros(out.shape, bool)
    seen[:, :, -1, 3] = True
    assert (np.isnan(out) == seen).all() and (out[~seen] == clean[~seen]).all()


@pytest.mark.parametrize("cut", [1, 5, 16, 48, 100])
def test_a_prefill_in_pieces_has_the_bits_of_the_whole(cut):
    q, k, v = arrays(2, 1, 200, 200, 24)
    full = sdpa(q, k, v, is_causal=True)
    for begin in range(0, 200, cut):
        end = min(begin + cut, 200)
        piece = sdpa(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], is_causal=True)
        assert (piece == full[:, :, begin:end]).all()


def test_a_masked_step_has_the_bits_of_the_full_forward():
    q, k, v = arrays(4, 2, 150, 150, 32)
    rng = np.random.default_rng(0)
    for mask in (rng.random((150, 150)) < 0.7, rng.standard_normal((150, 150)).astype(np.float32)):
        full = sdpa(q, k, v, mask, is_causal=True)
        for n in (1, 60, 129, 150):
            step = sdpa(q[:, :, n - 1:n], k[:, :, :n], v[:, :, :n], mask[n - 1:n, :n], is_causal=True)
            assert (step == full[:, :, n - 1:n]).all()


def test_a_step_on_a_cache_with_room_reads_it_in_place():
    q, k, v = arrays(4, 2, 1, 100, 32, batch=2)
    caches = np.full((2, 2, 2, 256, 32), np.nan, np.float32)
    caches[0, :, :, :100], caches[1, :, :, :100] = k, v
    assert (sdpa(q, caches[0, :, :, :100], caches[1, :, :, :100]) == sdpa(q, k, v)).all()
