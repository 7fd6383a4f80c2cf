"""numformer.torch.scaled_dot_product_attention against torch's own."""
import itertools

import numpy as np
import pytest

import numformer as nf

torch = pytest.importorskip("torch")
functional = torch.nn.functional
nft = pytest.importorskip("numformer.torch")


def tensors(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def compare(shapes, mask=None, dtype=torch.float64, **keywords):
    """Output and gradients of ours and torch's."""
    results = []
    for op in (nft.scaled_dot_product_attention, functional.scaled_dot_product_attention):
        leaves = tensors(shapes, dtype)
        masks = [] if mask is None else [mask.clone().requires_grad_(mask.is_floating_point())]
        out = op(*leaves, *masks, **keywords)
        leaves += [x for x in masks if x.requires_grad]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


SQUARE = ((2, 4, 9, 8),) * 3
CROSS = ((2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 6))
GROUPED = ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shapes", "causal"), list(itertools.product([SQUARE, CROSS, GROUPED], [False, True])))
def test_output_and_gradients_are_those_of_torch(shapes, causal, dtype):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    compare(shapes, dtype=dtype, is_causal=causal, enable_gqa=shapes is GROUPED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_short_types_are_those_of_float32_rounded_once(dtype):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    short = [(x + 3).to(dtype).detach() for x in tensors(SQUARE)]
    results = []
    for leaves in (short, [x.float() for x in short]):
        out = nft.scaled_dot_product_attention(*(x.requires_grad_() for x in leaves))
        results.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    for ours, wide in zip(*results, strict=True):
        assert torch.equal(ours, wide.to(dtype))


@pytest.mark.parametrize("shape", [(2, 4, 5, 9), (4, 5, 9), (5, 9), (2, 1, 1, 9), (1, 4, 5, 1), (1, 1)])
def test_masks_of_every_shape_and_the_gradient_of_an_added_one(shape):
    generator = torch.Generator().manual_seed(2)
    added = torch.randn(shape, generator=generator, dtype=torch.float64)
    compare(CROSS, added, scale=0.3)
    boolean = added > -0.7
    boolean.view(-1)[0] = True
    compare(CROSS, boolean)


def test_an_expanded_mask_gets_the_gradient_of_each_of_its_elements():
    base = torch.randn((2, 1, 1, 9), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for op in (nft.scaled_dot_product_attention, functional.scaled_dot_product_attention):
        leaf = base.expand(2, 4, 5, 9).detach().requires_grad_()
        op(*tensors(CROSS, torch.float64), leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shapes", [((7, 8), (9, 8), (9, 4)), ((3, 7, 8), (3, 9, 8), (3, 9, 4)),
                                    ((2, 3, 4, 7, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 4))])
def test_leading_axes_may_be_any_number(shapes):
    compare(shapes)
    compare(shapes, torch.randn((*shapes[0][:-1], shapes[1][-2]), dtype=torch.float64))
    compare(shapes, torch.randn((7, 9), dtype=torch.float64))


def test_no_queries_of_five_axes_have_no_results_and_a_mask_no_gradient():
    query, key, value = tensors(((2, 3, 4, 0, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 4)))
    mask = torch.zeros((3, 1, 0, 9), requires_grad=True)
    out = nft.scaled_dot_product_attention(query, key, value, mask)
    out.sum().backward()
    assert out.shape == (2, 3, 4, 0, 4) and mask.grad.shape == mask.shape and not key.grad.any()


def test_gradcheck_with_everything_that_has_a_gradient():
    query, key, value = tensors(((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)), torch.float64)
    mask, slopes, sinks = tensors(((4, 1, 6), (4,), (4,)), torch.float64, seed=3)

    def attention(*x):
        return nft.scaled_dot_product_attention(
            *x[:4], is_causal=True, enable_gqa=True, causal_align="bottom_right", window_size=(3, 1), softcap=2.0,
            alibi_slopes=x[4], sinks=x[5], return_lse=True)

    assert torch.autograd.gradcheck(attention, (query, key, value, mask, slopes, sinks))


def test_dropout_follows_torchs_seed_and_is_the_same_under_a_checkpoint():
    def run(checkpointed):
        torch.manual_seed(5)
        leaves = tensors(SQUARE)

        def attention(*x):
            return nft.scaled_dot_product_attention(*x, dropout_p=0.4)

        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(attention, *leaves, use_reentrant=False)
        else:
            out = attention(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    plain = run(False)
    for other in (run(False), run(True)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    undropped = nft.scaled_dot_product_attention(*tensors(SQUARE))
    assert not torch.equal(plain[0], undropped)
    torch.manual_seed(6)
    many = torch.stack([nft.scaled_dot_product_attention(*tensors(SQUARE), dropout_p=0.4).detach() for _ in range(600)])
    assert (many.mean(0) - undropped).abs().max() < 0.2


def test_what_goes_in_and_what_comes_out_is_not_copied(monkeypatch):
    """Views of one joined projection (B, S, 3, H, D) reach the kernel where they lie."""
    joined = torch.randn(2, 16, 3, 4, 8, requires_grad=True)
    query, key, value = joined.permute(2, 0, 3, 1, 4)
    seen, given = [], []
    forward = nft.attention_forward

    def watched(**keywords):
        seen.extend(keywords[name].__array_interface__["data"][0] for name in ("query", "key", "value"))
        result = forward(**keywords)
        given.append(result[0][0].__array_interface__["data"][0])
        return result

    monkeypatch.setattr(nft, "attention_forward", watched)
    out = nft.scaled_dot_product_attention(query, key, value)
    assert seen == [x.data_ptr() for x in (query, key, value)] and given == [out.data_ptr()]
    assert out.transpose(1, 2).is_contiguous()          # joining the heads copies nothing either
    out.square().sum().backward()
    ours, joined.grad = joined.grad, None
    functional.scaled_dot_product_attention(query, key, value).square().sum().backward()
    torch.testing.assert_close(ours, joined.grad)


def test_without_gradients_nothing_is_kept_and_the_bits_are_the_same():
    leaves = tensors(SQUARE)
    recorded = nft.scaled_dot_product_attention(*leaves, is_causal=True)
    with torch.no_grad():
        plain = nft.scaled_dot_product_attention(*leaves, is_causal=True)
    assert plain.grad_fn is None and torch.equal(plain, recorded)


def test_a_row_without_keys_is_zero_with_zero_gradients():
    leaves = tensors(SQUARE)
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    out = nft.scaled_dot_product_attention(*leaves, mask)
    assert (out[:, :, 4] == 0).all() and torch.autograd.grad(out[:, :, 4].sum(), leaves[0])[0].abs().max() == 0


def test_torch_watches_what_was_saved():
    query, key, value = tensors(SQUARE)
    late = key * 1
    out = nft.scaled_dot_product_attention(query, late, value)
    late.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore")         # of torch about itself
@pytest.mark.parametrize("record", [False, True])
def test_a_derivative_of_forward_mode_is_refused(record):
    q, k, v = (x.detach().requires_grad_(record) for x in tensors(SQUARE))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        nft.scaled_dot_product_attention(q, torch.autograd.forward_ad.make_dual(k, torch.ones_like(k)), v)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", [lambda f, x: torch.func.grad(lambda *x: f(*x).sum())(*x),
                                       lambda f, x: torch.func.vjp(f, *x), lambda f, x: torch.func.vmap(f)(*x),
                                       lambda f, x: torch.func.jvp(f, x, x)])
def test_a_transform_of_torch_func_is_refused(transform):
    with pytest.raises(RuntimeError):
        transform(nft.scaled_dot_product_attention, tuple(x.detach() for x in tensors(SQUARE)))


def test_a_second_derivative_is_refused():
    query, key, value = tensors(SQUARE)
    out = nft.scaled_dot_product_attention(query, key, value)
    gradient, = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore")         # of torch about itself
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_breaks_its_graph_there_and_goes_on(backend):
    def function(query, key, value, mask):
        y = nft.scaled_dot_product_attention(query * 2, key, value, mask, is_causal=True)
        return (y * 3).sum(-1)

    leaves = [*tensors(SQUARE), *tensors(((9, 9),), seed=4)]
    results = []
    torch.compiler.reset()
    for f in (function, torch.compile(function, backend=backend)):
        y = f(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, ours)


def test_a_float32_mask_serves_every_dtype():
    for dtype in (torch.float64, torch.float16):
        mask = torch.randn(9, 9, requires_grad=True)
        leaves = tensors(SQUARE, dtype)
        nft.scaled_dot_product_attention(*leaves, mask).sum().backward()
        assert mask.grad.dtype == torch.float32 and mask.grad.isfinite().all() and mask.grad.any()


@pytest.mark.parametrize(("change", "error", "match"), [
    (lambda q, k, v: (q.to("meta"), k, v), TypeError, "query must be a dense tensor on the CPU, got one on meta"),
    (lambda q, k, v: (q, k.to_sparse(), v), TypeError, "key must be a dense tensor on the CPU, got one of layout"),
    (lambda q, k, v: (q.to(torch.complex64),) * 3, TypeError, "query must be of one of the dtypes .*complex64"),
    (lambda q, k, v: (q.int(), k, v), TypeError, "query must be of one of the dtypes .*int32"),
    (lambda q, k, v: (q, k.double(), v), TypeError, "float64"),
    (lambda q, k, v: (q, np.zeros((2, 4, 9, 8)), v), TypeError, "key must be a torch tensor, got ndarray"),
    (lambda q, k, v: (q, k, v, torch.zeros(9, 9, dtype=torch.int64)), TypeError, "attn_mask must be of one of"),
    (lambda q, k, v: (q, k[:, :2], v[:, :2]), ValueError, "query has 4 heads and key 2: pass enable_gqa=True"),
    (lambda q, k, v: (q, k[0], v), ValueError, "as many axes"),
    (lambda q, k, v: (q, k, v, torch.zeros(9, 8)), ValueError, "broadcast"),
    (lambda q, k, v: (q, k, v[:, :, :8]), ValueError, "value"),
])
def test_bad_input_is_refused_and_named(change, error, match):
    q, k, v = (x.detach() for x in tensors(SQUARE))
    with pytest.raises(error, match=match):
        nft.scaled_dot_product_attention(*change(q, k, v))


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("scale", ["x", torch.ones((), requires_grad=True)])
def test_a_scale_that_is_no_number_or_wants_a_gradient_is_refused(scale, record):
    q, k, v = (x.detach().requires_grad_(record) for x in tensors(SQUARE))
    with pytest.raises(TypeError, match="scaled_dot_product_attention: scale must be a real number,"):
        nft.scaled_dot_product_attention(q, k, v, scale=scale)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"requires_grad": True}])
@pytest.mark.parametrize("op", [lambda x: nf.scaled_dot_product_attention(x, x, x), nf.gelu, nf.Tensor])
def test_a_tensor_that_is_no_array_is_told_of_numformer_torch(op, options):
    with pytest.raises(TypeError, match=r"must be an array, got Tensor: .*; numformer\.torch has the attention of"):
        op(torch.ones((1, 2, 3, 4), **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_tensor_is_refused():
    with pytest.raises(TypeError, match="on cuda"):
        nft.scaled_dot_product_attention(*(x.detach().cuda() for x in tensors(SQUARE)))


def test_autocast_makes_of_the_arrays_what_it_does_for_torch():
    pytest.importorskip("ml_dtypes")
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[3] = torch.finfo(torch.float32).min        # of which autocast would make -inf
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for some in ((q, k, v), (q, k.bfloat16(), v), (q.double(), k.double(), v.double())):
            ours, theirs = (f(*some, mask.to(some[0].dtype)) for f in (
                nft.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention))
            assert ours.dtype == theirs.dtype
            keep = [0, 1, 2, 4, 5, 6, 7, 8]
            torch.testing.assert_close(ours[:, :, keep], theirs[:, :, keep], rtol=0.05, atol=0.02)
            assert (ours[:, :, 3] != 0).all()
