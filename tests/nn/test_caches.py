"""MultiHeadAttention with windows, ALiBi or rotary positions, its caches, and maps of its weights."""
import copy
import functools
import tracemalloc

import numpy as np
import pytest

import numformer as nf
from numformer.nn import KVCache, MultiHeadAttention, PagedKVCache, RollingKVCache, attention_maps, rotary_tables

S = 150
FORMS = {"plain": {}, "rotary": {}, "alibi": {"alibi": True}, "window": {"window_size": (20, 0)},
         "window, rotary": {"window_size": (20, 0)}, "window, alibi": {"alibi": True, "window_size": (33, -1)}}
WINDOWS = [name for name in FORMS if "window" in name]


def layers(form, n=1, **more):
    rng = np.random.default_rng(0)
    return [MultiHeadAttention(32, 4, 2, rng=rng, **FORMS[form], **more) for _ in range(n)]


def positions(form, start, end):
    if "rotary" not in form:
        return None
    return tuple(table[start:end] for table in rotary_tables(5000, 8))


def stream(batch=2, length=S):
    return np.random.default_rng(1).standard_normal((batch, length, 32), np.float32)


def caches(attentions, batch=2):
    made = [KVCache(attentions, batch, S), PagedKVCache(attentions, batch, 40, block_size=8)]
    if all(a.window_size[0] >= 0 for a in attentions):
        made += [RollingKVCache(attentions, batch), RollingKVCache(attentions, batch, piece=16)]
    return made


@pytest.mark.parametrize("form", FORMS)
def test_a_step_from_any_cache_has_the_bits_of_the_full_forward(form):
    attentions, x = layers(form, 2), stream()
    with nf.no_grad():
        whole = x
        for a in attentions:
            whole = a(whole, positions(form, 0, S)).data
        for cache in caches(attentions):
            done = 0
            for count in (37, 1, 1, 64, 40, 1, 1, 5):
                y = x[:, done:done + count]
                for layer, a in enumerate(attentions):
                    y = a(y, positions(form, done, done + count), cache, layer).data
                cache.advance(count)
                assert (y == whole[:, done:done + count]).all(), (type(cache).__name__, done)
                done += count
            assert done == S == cache.length


def test_a_step_from_any_cache_needs_no_no_grad_and_carries_no_gradient():
    attentions, x = layers("window"), stream(2, 6)
    for dtype in (np.float32, np.float16):
        for cache in (KVCache(attentions, 2, S, dtype), RollingKVCache(attentions, 2, dtype),
                      PagedKVCache(attentions, 2, 40, block_size=8, dtype=dtype)):
            with nf.no_grad():
                want = attentions[0](nf.Tensor(x), cache=copy.deepcopy(cache)).data
            leaf = nf.Tensor(x, requires_grad=True)
            y = attentions[0](leaf, cache=cache)
            assert (y.data == want).all()
            y.sum().backward()
            assert leaf.grad is None and attentions[0].out.grad is not None


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_no_positions_are_taken_by_any_cache_and_change_nothing(dtype):
    attentions, x = layers("window"), stream(2, 5)
    made = [PagedKVCache(attentions, 2, 40, dtype=dtype)]
    if dtype != "int8":
        made += [KVCache(attentions, 2, S, dtype), RollingKVCache(attentions, 2, dtype)]
    for cache in made:
        whole, cut = cache, copy.deepcopy(cache)
        want = attentions[0](x, cache=whole).data
        for piece in (x[:, :0], x[:, :3], x[:, :0], x[:, 3:]):
            y = attentions[0](piece, cache=cut).data
            cut.advance(piece.shape[1])
            assert y.shape == piece.shape
        assert (y == want[:, 3:]).all()


@pytest.mark.parametrize("form", WINDOWS)
def test_a_rolling_cache_keeps_the_window_alone_and_the_bits_of_a_long_text(form):
    length = 4500
    (a,), x = layers(form), stream(1, length)
    cache = RollingKVCache([a], 1, piece=32)
    held = cache.keys[0].size
    assert held <= (a.window_size[0] + 32 + 2 * 16) * 2 * 8
    with nf.no_grad():
        whole = a(x, positions(form, 0, length)).data
        for start in range(0, length, 100):
            y = a(x[:, start:start + 100], positions(form, start, start + 100), cache).data
            cache.advance(y.shape[1])
            assert (y == whole[:, start:start + 100]).all()
    assert cache.keys[0].size == held and cache.length == length


def test_a_rolling_cache_takes_a_step_again_as_long_as_what_it_sees_is_there():
    layer = MultiHeadAttention(16, 2, window_size=(20, 0), rng=np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal((1, S, 16)).astype(np.float32)
    y, cache = layer(x), RollingKVCache([layer], 1, piece=32)
    layer(x[:, :50], cache=cache)
    cache.advance(50)
    for _ in range(2):          # the first is interrupted before it is counted
        assert (layer(x[:, 50:82], cache=cache).data == y.data[:, 50:82]).all()
    layer(x[:, 50:], cache=cache)
    with pytest.raises(ValueError, match="layer 0 has been given 150 positions, 50 are counted"):
        layer(x[:, 50:], cache=cache)


def test_sequences_of_different_lengths_share_a_pool_and_give_their_blocks_back():
    (a,), x = layers("alibi"), stream(3)
    cache = PagedKVCache([a], 3, 12, block_size=8)
    lengths = [30, 3, 17]
    with nf.no_grad():
        for row, n in enumerate(lengths):
            one = cache.of([row])
            one_row = a(x[row:row + 1, :n], cache=one).data
            one.advance(n)
            assert (one_row == a(x[row:row + 1, :n]).data).all()
        assert cache.lengths.tolist() == lengths
        with pytest.raises(ValueError, match="different lengths"):
            _ = cache.length
        step = a(np.stack([x[row, n] for row, n in enumerate(lengths)])[:, None], cache=cache).data
        cache.advance(1)
        for row, n in enumerate(lengths):
            assert (step[row, 0] == a(x[row:row + 1, :n + 1]).data[0, n]).all()
        with pytest.raises(ValueError, match=r"7 more blocks .* 4 of 12 are free; release"):
            a(x[:1, :60], cache=cache.of([1]))
        assert cache.lengths.tolist() == [31, 4, 18]        # and nothing was taken
        cache.release(0)
        cache.release(1)
        assert (a(x[:1, :60], cache=cache.of([1])).data == a(x[:1, :60]).data).all()


def stored(x, dtype):
    """Keys or values (B, H, S, D) as a cache of this type gives them back."""
    if dtype == np.int8:
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return np.rint(x / scale) * scale
    return x.astype(dtype).astype(np.float32)


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_from_a_short_cache_has_the_bits_of_the_full_forward_on_rounded_keys(form, storage):
    """int8, whose scales are no part of the sums: the bits of one piece, which is that forward but for roundings."""
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if storage == "bfloat16" else storage)
    (a,), x = layers(form), stream()
    q, k, v = a._turned(nf.linear(x, a.qkv.data), positions(form, 0, S))
    heads = nf.scaled_dot_product_attention(q, stored(k, dtype), stored(v, dtype), is_causal=True,
                                            window_size=a.window_size, alibi_slopes=a.slopes)
    whole = nf.linear(heads.swapaxes(1, 2).reshape(2, S, 32), a.out.data)
    made = [PagedKVCache([a], 2, 40, block_size=8, dtype=dtype)]
    if storage != "int8":
        made.append(KVCache([a], 2, S, dtype))
        made += [RollingKVCache([a], 2, dtype, piece=16)] if form in WINDOWS else []
    else:
        with nf.no_grad():
            piece = a(x, positions(form, 0, S), PagedKVCache([a], 2, 40, block_size=8, dtype=dtype)).data
        np.testing.assert_allclose(piece, whole, rtol=1e-5, atol=1e-6)
        whole = piece
    with nf.no_grad():
        assert (a(x, positions(form, 0, S)).data != whole).any()
        for cache in made:
            done = 0
            for count in (37, 1, 64, 47, 1):
                y = a(x[:, done:done + count], positions(form, done, done + count), cache).data
                cache.advance(count)
                assert cache.keys[0].dtype == dtype
                assert (y == whole[:, done:done + count]).all(), (type(cache).__name__, done)
                done += count


def test_rows_of_zeros_are_stored_as_bytes_too():
    (a,) = layers("plain")
    cache = PagedKVCache([a], 1, 4, dtype=np.int8)
    with nf.no_grad():
        assert (a(np.zeros((1, 3, 32), np.float32), cache=cache).data == 0).all()


def test_types_that_no_cache_holds_are_refused():
    attentions = layers("window")
    for make in (lambda d: KVCache(attentions, 1, 8, d), lambda d: RollingKVCache(attentions, 1, d)):
        with pytest.raises(TypeError, match=r"dtype must be float32, float64, float16 or bfloat16 .* got int8"):
            make(np.int8)
    with pytest.raises(TypeError, match="got int32"):
        PagedKVCache(attentions, 1, 8, dtype=np.int32)


@pytest.mark.parametrize(("dtype", "stored"), [(np.float32, np.float64), (np.float64, np.float32),
                                               (np.float64, np.int8)])
def test_a_cache_of_no_dtype_for_the_model_is_named(dtype, stored):
    layer = MultiHeadAttention(16, 2, window_size=(3, 0), rng=np.random.default_rng(0), dtype=dtype)
    caches = [PagedKVCache([layer], 1, 4, dtype=stored)]
    if stored != np.int8:
        caches += [KVCache([layer], 1, 8, stored), RollingKVCache([layer], 1, stored)]
    for cache in caches:
        with pytest.raises(TypeError, match=f"cache is of {np.dtype(stored)} and the model of {np.dtype(dtype)}: make"):
            layer(np.ones((1, 4, 16), dtype), cache=cache)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_form_are_those_of_its_parts(form):
    """The packed path against query, key and value apart."""
    (a,), x = layers(form, bias=True), stream(2, 60)
    weight = np.random.default_rng(2).standard_normal((2, 60, 32), np.float32)
    gradients = []
    for packed in (True, False):
        leaf = nf.Tensor(x, requires_grad=True)
        for p in a.parameters():
            p.grad = None
        if packed:
            y = a(leaf, positions(form, 0, 60))
        else:
            q, k, v = a._turned(nf.linear(leaf, a.qkv, a.qkv_bias), positions(form, 0, 60))
            y = nf.scaled_dot_product_attention(q, k, v, is_causal=True, window_size=a.window_size,
                                                alibi_slopes=a.slopes)
            y = nf.linear(y.swapaxes(1, 2).reshape(2, 60, 32), a.out, a.out_bias)
        (y * weight).sum().backward()
        gradients.append([y.data, leaf.grad, *(p.grad for p in a.parameters())])
    for ours, parts in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_maps_are_the_weights_that_make_the_result(form):
    (a,), x = layers(form), stream()
    rotary = positions(form, 0, S)
    whole = a.maps(x, rotary)
    assert whole.shape == (2, 4, S, S)
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)
    v = a._turned(nf.linear(x, a.qkv.data), None)[2]
    made = (whole @ np.repeat(v, 2, axis=1)).swapaxes(1, 2).reshape(2, S, 32)
    np.testing.assert_allclose(made, a.heads(x, rotary).data, rtol=1e-4, atol=1e-5)
    chosen = a.maps(x, rotary, heads=[3, 0], rows=[-1, 5])
    np.testing.assert_allclose(chosen, whole[:, [3, 0]][:, :, [-1, 5]], rtol=1e-5, atol=1e-7)


def test_maps_know_every_keyword():
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 4, 7, 5), (2, 2, 9, 5), (2, 2, 9, 3)))
    k[1, :, 6:] = np.nan
    v[1, :, 6:] = np.nan
    boolean = rng.random((2, 4, 7, 9)) > 0.3
    for mask in (None, boolean, rng.standard_normal((4, 1, 9))):
        for align in ("bottom_right", "top_left"):
            keywords = {"causal_align": align, "window_size": (4, 2), "softcap": 3.0, "scale": 0.7,
                        "alibi_slopes": nf.alibi_slopes(4).astype(float), "sinks": rng.standard_normal(4),
                        "kv_lengths": [9, 6]}
            for causal in (False, True):
                w = attention_maps(q, k, mask, causal, **keywords)
                expected = nf.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **keywords)
                np.testing.assert_allclose(w @ np.repeat(np.nan_to_num(v), 2, axis=1), expected, atol=1e-12)
                one = attention_maps(q, k, mask, causal, heads=2, rows=-1, **keywords)
                np.testing.assert_allclose(one[:, 0, 0], w[:, 2, -1], atol=1e-15)


def test_maps_of_what_is_masked_and_of_unsigned_lengths():
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((1, 2, 3, 5)), rng.standard_normal((1, 2, 9, 5))
    mask = np.where(np.arange(9) < 6, 0.5, -np.inf)
    want = attention_maps(q, k, mask)
    for anything in (np.nan, np.inf, 1e308):
        k[:, :, 6:] = anything
        assert (attention_maps(q, k, mask) == want).all()
    for dtype in (np.uint8, np.uint64, np.int8):        # fewer keys than queries: the first stand before key 0
        got = attention_maps(q, k, is_causal=True, kv_lengths=np.array([2], dtype))
        assert (got == attention_maps(q, k, is_causal=True, kv_lengths=[2])).all() and (got[:, :, 0] == 0).all()
    for wrong in ([10], [-1], [1, 2], [1.0]):
        with pytest.raises(ValueError, match="kv_lengths must be 1 integers between 0 and Sk = 9"):
            attention_maps(q, k, kv_lengths=wrong)


def test_a_map_of_one_row_holds_no_square():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 2, 20000, 8), np.float32)
    tracemalloc.start()
    w = attention_maps(q, k, is_causal=True, heads=1, rows=[10000, 19999])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert w.shape == (1, 1, 2, 20000) and peak < 30 * w.nbytes


@pytest.mark.parametrize(("keywords", "error", "match"), [
    ({"window_size": (-2, 0)}, ValueError, "each -1 or more"),
    ({"window_size": (3, 2)}, ValueError, "nothing ahead where causal"),
    ({"window_size": 5}, ValueError, r"window_size must be two numbers of keys, \(left, right\), got 5"),
    ({"window_size": (1, 2, 3)}, ValueError, "window_size must be two numbers of keys"),
    ({"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\), got 1.5"),
    ({"dropout": "some"}, TypeError, "dropout must be a real number, got 'some'"),
    ({"alibi": "yes"}, TypeError, "alibi must be a bool or 4 slopes, got 'yes'"),
    ({"alibi": None}, TypeError, "alibi must be a bool or 4 slopes, got None"),
    ({"alibi": True, "causal": False}, ValueError, "alibi lowers .* would raise those of keys ahead"),
    ({"alibi": np.ones(4), "causal": False, "window_size": (5, 1)}, ValueError, "would raise those of keys ahead"),
])
def test_options_that_mean_nothing_are_refused(keywords, error, match):
    with pytest.raises(error, match=f"MultiHeadAttention: .*{match}"):
        MultiHeadAttention(32, 4, rng=np.random.default_rng(0), **keywords)


def test_combinations_that_mean_nothing_are_refused():
    x = stream()
    (a,), (plain,) = layers("alibi"), layers("plain")
    with pytest.raises(ValueError, match="alibi or by rotary, and here are both"):
        a(x, positions("rotary", 0, S))
    with pytest.raises(ValueError, match="there is no cache for it"):
        layers("plain", causal=False)[0](x, cache=KVCache([plain], 2, S))
    with pytest.raises(ValueError, match="causal"):
        PagedKVCache(layers("plain", causal=False), 2, 8)
    with pytest.raises(ValueError, match="window bounded on the left"):
        RollingKVCache([plain], 2)
    with pytest.raises(ValueError, match="151 positions, and the capacity is 150"):
        plain(stream(2, 151), cache=KVCache([plain], 2, S))
    for cache in (KVCache([plain], 2, S), RollingKVCache(layers("window"), 2)):
        with pytest.raises(ValueError, match=f"{type(cache).__name__}: a batch of 1, and the cache is for 2 sequences"):
            plain(x[:1], cache=cache)
    with pytest.raises(ValueError, match="a batch of 1 for 2 sequences"):
        plain(x[:1], cache=PagedKVCache([plain], 2, 8))
    (dropping,) = layers("window", dropout=0.5)
    with pytest.raises(ValueError, match="call eval"):
        dropping(x, cache=RollingKVCache([dropping], 2))
    with pytest.raises(ValueError, match="call eval"):
        dropping(x, cache=KVCache([dropping], 2, S))
    with pytest.raises(ValueError, match="heads must be integers below 4"):
        plain.maps(x, heads=4)
    with pytest.raises(ValueError, match="rows must be integers below 150"):
        plain.maps(x, rows=[0.5])
    for wrong in (x[0], 3):
        for see in (plain, plain.maps):
            with pytest.raises(ValueError, match=r"MultiHeadAttention: x must .* got (int|\(150, 32\))"):
                see(wrong)
    for heads, key_heads in ((3, 2), (2, 0)):
        with pytest.raises(ValueError, match="H a multiple of Hkv"):
            attention_maps(np.zeros((1, heads, 2, 4)), np.zeros((1, key_heads, 2, 4)))


def test_maps_of_nothing_are_empty():
    def maps(query=(2, 4, 3, 8), key=(2, 2, 5, 8), **keywords):
        return attention_maps(np.ones(query, np.float32), np.ones(key, np.float32), softcap=2.0, is_causal=True,
                              alibi_slopes=np.ones(query[1], np.float32), sinks=np.ones(query[1], np.float32),
                              attn_mask=np.zeros((query[2], 5), np.float32), **keywords)

    assert maps(heads=[]).shape == (2, 0, 3, 5) and maps(rows=()).shape == (2, 4, 0, 5)
    assert maps(heads=[], rows=np.array([], int)).shape == (2, 0, 0, 5)
    assert maps((2, 0, 3, 8), (2, 0, 5, 8)).shape == (2, 0, 3, 5)
    np.testing.assert_allclose(attention_maps(np.ones((1, 2, 3, 0)), np.ones((1, 2, 5, 0))), 0.2)     # as of scores 0


@pytest.mark.parametrize(("keywords", "error", "match"), [
    ({"window_size": 5}, ValueError, "window_size must be two numbers of keys"),
    ({"window_size": (-2, 0)}, ValueError, "window_size must be two numbers of keys"),
    ({"scale": "x"}, TypeError, "scale must be a real number, got 'x'"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and not negative"),
    ({"attn_mask": np.zeros((2, 4), np.float32)}, ValueError, r"attn_mask must broadcast to .* \(1, 4, 2, 3\)"),
    ({"attn_mask": np.ones((2, 3), int)}, TypeError, "attn_mask must be boolean or of floats, got int64"),
    ({"alibi_slopes": [1, 2, 3, 4]}, TypeError, "alibi_slopes must be of floats, got int64"),
    ({"alibi_slopes": np.ones(3, np.float32)}, ValueError, "alibi_slopes must have shape"),
    ({"sinks": np.ones((1, 4), np.float32)}, ValueError, "sinks must have shape"),
    ({"key": np.ones((1, 2, 3, 8))}, TypeError, "key float64"),
    ({"query": np.ones((1, 4, 2, 8), int)}, TypeError, "query must be float32 or float64, got int64"),
])
def test_what_maps_cannot_be_made_of_is_named(keywords, error, match):
    arrays = {"query": np.ones((1, 4, 2, 8), np.float32), "key": np.ones((1, 2, 3, 8), np.float32)}
    with pytest.raises(error, match=f"attention_maps: .*{match}"):
        attention_maps(**arrays | keywords)
    wide = attention_maps(**arrays, window_size=(2**70, 2**70))
    assert (wide == attention_maps(**arrays)).all()


@pytest.mark.parametrize(("make", "match"), [
    (lambda a: KVCache([a], 0, 8), "KVCache: batch must be 1 or more, got 0"),
    (lambda a: KVCache([a], 2, 0), "KVCache: capacity must be 1 or more, got 0"),
    (lambda a: RollingKVCache([a], 2, piece=0), "RollingKVCache: piece must be 1 or more, got 0"),
    (lambda a: PagedKVCache([a], 2, 8, block_size=0), "PagedKVCache: block_size must be 1 or more, got 0"),
    (lambda a: PagedKVCache([a], 2, -1), "PagedKVCache: num_blocks must be 1 or more, got -1"),
])
def test_a_cache_of_no_size_is_refused_when_it_is_made(make, match):
    layer = MultiHeadAttention(16, 2, window_size=(3, 0), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=match):
        make(layer)


@pytest.mark.parametrize("rows", [[1, 1], [0, -3], [3], [-4], [1.0], [True, False, False], [[0]], []])
def test_what_names_no_sequences_of_a_pool_is_refused(rows):
    cache = PagedKVCache([MultiHeadAttention(16, 2, rng=np.random.default_rng(0))], 3, 4)
    with pytest.raises(ValueError, match=r"PagedKVCache: rows must be different integers within 0 .. 2, got \["):
        cache.of(rows)
    assert cache.of(1).rows.tolist() == [1] and cache.of([-1, 0]).rows.tolist() == [2, 0]


@pytest.mark.parametrize(("keywords", "error", "match"), [
    ({"cache": 3}, TypeError, "cache must be a KVCache, RollingKVCache or PagedKVCache, got int"),
    ({"rotary": 3}, TypeError, r"rotary must be the pair \(cos, sin\), as rotary_tables gives it, got 3"),
    ({"rotary": rotary_tables(5, 8)[:1]}, TypeError, r"rotary must be the pair \(cos, sin\)"),
    ({"rotary": (0.0, 1.0)}, ValueError, r"each \(S, head_dim / 2\) = \(5, 4\), got shapes \(\) and \(\)"),
    ({"rotary": rotary_tables(5, 4)}, ValueError, r"got shapes \(5, 2\) and \(5, 2\)"),
    ({"rotary": rotary_tables(5, 16)}, ValueError, r"got shapes \(5, 8\) and \(5, 8\)"),
    ({"rotary": rotary_tables(1, 8)}, ValueError, r"got shapes \(1, 4\) and \(1, 4\)"),
])
def test_what_is_no_cache_and_no_pair_of_tables_is_named(keywords, error, match):
    layer, x = MultiHeadAttention(16, 2, rng=np.random.default_rng(0)), np.ones((1, 5, 16), np.float32)
    cached = functools.partial(layer, cache=KVCache([layer], 1, 8))
    calls = [layer] if "cache" in keywords else [layer, layer.maps, cached]
    for call in calls:
        with pytest.raises(error, match=f"MultiHeadAttention: .*{match}"):
            call(x, **keywords)


def test_rotary_tables_may_be_lists():
    layer, x = MultiHeadAttention(16, 2, rng=np.random.default_rng(0), dtype=np.float64), np.ones((1, 5, 16))
    tables = rotary_tables(5, 8, dtype=np.float64)
    assert (layer(x, [table.tolist() for table in tables]).data == layer(x, tables).data).all()
