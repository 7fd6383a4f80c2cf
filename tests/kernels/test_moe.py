import numpy as np
import pytest

import numformer as nf
from numformer import moe
from tests import oracle
from tests.gradients import check_gradients, normal

ROUTERS = {
    "mixtral": dict(top_k=2),
    "switch": dict(top_k=1, normalize=False),
    "deepseek-v2": dict(top_k=3, normalize=False, num_groups=4, top_groups=2, scale=16.0),
    "deepseek-v3": dict(top_k=3, score="sigmoid", num_groups=4, top_groups=2, scale=2.5),
    "sigmoid": dict(top_k=2, score="sigmoid", normalize=False),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("tokens, dtype", [(1, np.float32), (33, np.float32), (97, np.float64)])
def test_routers_match_the_formulas(router, tokens, dtype):
    logits = normal(tokens, 16, dtype=dtype)
    options = dict(ROUTERS[router])
    if router == "deepseek-v3":
        options["bias"] = normal(16, dtype=dtype)
    r = moe.route(logits, **options)
    weight, index, scores = oracle.moe_route(logits, **options)
    assert (r.expert_index == index).all()
    np.testing.assert_allclose(r.weight, weight, rtol=2e-6)
    np.testing.assert_allclose(r.probabilities, scores, rtol=2e-6)
    assert r.weight.dtype == r.probabilities.dtype == dtype


@pytest.mark.parametrize("tokens, experts, k", [(0, 3, 1), (1, 1, 1), (1, 8, 2), (17, 5, 5), (64, 64, 3), (300, 4, 2)])
def test_rows_are_sorted_by_expert_and_then_by_token(tokens, experts, k):
    r = moe.route(normal(tokens, experts), k)
    expected = np.argsort(r.expert_index.ravel(), kind="stable")
    assert (r.source == expected // k).all()
    assert (r.row.ravel()[expected] == np.arange(tokens * k)).all()
    assert (r.counts == np.bincount(r.expert_index.ravel(), minlength=experts)).all()
    assert (np.diff(r.offsets) == r.counts).all() and r.offsets[0] == 0
    assert (r.chosen == r.counts).all()


def test_ties_go_to_the_lowest_expert():
    r = moe.route(np.zeros((2, 7), np.float32), 3)
    assert (r.expert_index == [0, 1, 2]).all()


def test_minus_infinity_takes_an_expert_out():
    logits = np.array([[-np.inf, 1, -np.inf, 0]], np.float32)
    r = moe.route(logits, 3)
    assert (r.expert_index == [[1, 3, 0]]).all() and r.weight[0, 2] == 0 and np.isfinite(r.weight).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_does_not_bring_back_what_minus_infinity_took_out(score):
    logits, bias = np.array([[-np.inf, 1, -np.inf, 0, 0.5, 0.25]], np.float32), np.array([9, 0, 5, 1, 0, 3], np.float32)
    r = moe.route(logits, 3, score=score, bias=bias)
    assert r.expert_index.tolist() == [[5, 3, 1]] and (r.weight > 0).all()
    r = moe.route(logits, 2, score=score, bias=bias, num_groups=2)      # the groups are weighed as before
    assert r.expert_index.tolist() == [[1, 0]] and r.weight.tolist() == [[1, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_spoil_their_own_token_alone(bad):
    logits = normal(5, 4, dtype=np.float32)
    clean = moe.route(logits, 2)
    logits[2, 1] = bad
    r = moe.route(logits, 2)
    others = [0, 1, 3, 4]
    assert np.isnan(r.weight[2]).all()
    assert (r.weight[others] == clean.weight[others]).all()
    assert ((r.expert_index >= 0) & (r.expert_index < 4)).all()
    logits[2] = np.nan
    assert (moe.route(logits, 2).expert_index[2] == [0, 1]).all()


def test_with_sigmoid_an_expert_of_nan_is_chosen_last_and_infinity_scores_one():
    logits = np.array([[1.0, np.nan, 2, np.inf]])
    r = moe.route(logits, 3, score="sigmoid", normalize=False)
    assert r.expert_index.tolist() == [[3, 2, 0]] and r.weight[0, 0] == 1 and np.isfinite(r.weight).all()
    r = moe.route(logits, 4, score="sigmoid")
    assert r.expert_index.tolist() == [[3, 2, 0, 1]] and np.isnan(r.weight).all()


def test_capacity_drops_second_choices_and_late_tokens_first():
    logits = np.array([[0, 9, 1], [9, 5, 0], [9, 0, 5], [9, 1, 0]], np.float32)     # 1 2, 0 1, 0 2, 0 1
    r = moe.route(logits, 2, capacity=2)
    assert (r.row == [[2, 4], [0, 3], [1, 5], [-1, -1]]).all()
    assert (r.counts == [2, 2, 2]).all() and (r.chosen == [3, 3, 2]).all()
    assert (r.source == [1, 2, 0, 1, 0, 2]).all()
    y = moe.combine(moe.dispatch(normal(4, 3, dtype=np.float32), r), r)
    assert (y[3] == 0).all() and (y[:3] != 0).all()
    assert len(moe.route(logits, 2, capacity=0).source) == 0


def test_padding_goes_nowhere_and_counts_nowhere():
    logits, x = normal(20, 4), normal(20, 5)
    mask = np.arange(20) % 3 != 1
    logits[~mask] = np.nan
    r, compact = moe.route(logits, 2, capacity=5, token_mask=mask), moe.route(logits[mask], 2, capacity=5)
    assert (r.counts == compact.counts).all() and r.tokens == compact.tokens == mask.sum()
    assert (r.expert_index[~mask] == -1).all() and (r.row[~mask] == -1).all() and (r.weight[~mask] == 0).all()
    assert (moe.dispatch(x, r) == moe.dispatch(x[mask], compact)).all()
    assert moe.load_balancing_loss(r) == moe.load_balancing_loss(compact)
    assert moe.router_z_loss(logits, token_mask=mask) == pytest.approx(moe.router_z_loss(logits[mask]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 3, 16, 33, 97])
def test_dispatch_and_combine_move_rows_there_and_back(dtype, width):
    x, r = normal(31, width, dtype=dtype), moe.route(normal(31, 6, dtype=dtype), 3)
    rows = moe.dispatch(x, r)
    assert rows.dtype == dtype and (rows == x[r.source]).all()
    y = normal(93, width, dtype=dtype)
    expected = (y[r.row].astype(np.float64) * r.weight[:, :, None]).sum(1)
    np.testing.assert_allclose(moe.combine(y, r), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(moe.combine(rows, r), x, rtol=0, atol=2e-6)


def test_bits_do_not_depend_on_threads_strides_or_company(threads):
    logits, x = normal(3000, 9, dtype=np.float32), normal(3000, 101, dtype=np.float32)
    r = moe.route(logits, 2)
    y = normal(6000, 101, dtype=np.float32)
    whole, rows = moe.combine(y, r), moe.dispatch(x, r)
    threads(1)
    again = moe.route(np.asfortranarray(logits), 2)
    for name in ("weight", "probabilities", "row", "source"):
        assert (getattr(again, name) == getattr(r, name)).all()
    assert (moe.combine(np.asfortranarray(y), again) == whole).all()
    assert (moe.dispatch(np.repeat(x, 2, axis=1)[:, ::2], again) == rows).all()
    alone = moe.route(logits[1234:1235], 2)
    assert (alone.weight == r.weight[1234]).all() and (alone.probabilities == r.probabilities[1234]).all()
    assert (moe.combine(y[r.row[1234]][np.argsort(r.expert_index[1234])], alone) == whole[1234]).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_router_gradients_are_the_slopes(router):
    logits, options = normal(5, 8), ROUTERS[router]
    check_gradients(lambda x: moe.route(x, **options).weight, logits)
    check_gradients(lambda x: moe.route(x, **options).probabilities, logits)


@pytest.mark.parametrize("capacity", [None, 3])
def test_dispatch_and_combine_gradients_are_the_slopes(capacity):
    mask = np.arange(7) != 4

    def there_and_back(x, logits):
        r = moe.route(logits, 2, capacity=capacity, token_mask=mask)
        return moe.combine(moe.dispatch(x, r), r)

    check_gradients(there_and_back, normal(7, 5), normal(7, 4), atol=1e-9)


def test_a_broadcast_gradient_is_read_as_it_stands():
    r = moe.route(normal(7, 4), 2)
    _, saved = nf.ops.moe.combine_forward(normal(14, 5), r)
    one = np.broadcast_to(np.float64(2), (7, 5))
    for a, b in zip(nf.ops.moe.combine_backward(one, saved), nf.ops.moe.combine_backward(one.copy(), saved)):
        assert a is b is None or (a == b).all()
    assert (nf.ops.moe.dispatch_backward(np.broadcast_to(np.float64(1), (14, 5)), r.order)[0] == 2).all()


@pytest.mark.parametrize("form, at_balance", [("switch", 1.0), ("mixtral", 2.0)])
def test_the_balancing_loss_at_balance(form, at_balance):
    logits = np.tile(np.eye(4) + np.roll(np.eye(4), 1, axis=1), (4, 1)) * 1e-9
    assert moe.load_balancing_loss(moe.route(logits, 2), form=form) == pytest.approx(at_balance)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["switch", "mixtral"])
def test_auxiliary_losses_and_their_gradients(score, form):
    logits = normal(9, 4)
    mask = np.arange(9) != 3
    options = dict(top_k=2, score=score, capacity=2, token_mask=mask)

    def value(logits):
        r = moe.route(logits, **options)
        return moe.load_balancing_loss(r, form=form) + 3 * moe.router_z_loss(logits, token_mask=mask)

    _, index, p = oracle.moe_route(logits[mask], 2, score)
    p = p / p.sum(1, keepdims=True)
    share = np.bincount(index.ravel(), minlength=4) / (16 if form == "switch" else 8)
    z = np.log(np.exp(logits[mask]).sum(1))
    np.testing.assert_allclose(value(logits), 4 * (share * p.mean(0)).sum() + 3 * (z**2).mean(), rtol=1e-12)
    check_gradients(value, logits, atol=1e-9)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["switch", "mixtral"])
def test_padding_that_the_routing_does_not_know_of_can_be_left_out_of_the_balancing_loss(score, form):
    logits = normal(12, 4)
    known, mask = np.arange(12) != 3, np.arange(12) % 4 != 1
    r, rest = (moe.route(x, 2, score=score, token_mask=m)
               for x, m in ((logits, known), (logits[known & mask], None)))
    assert moe.load_balancing_loss(r, form=form, token_mask=mask) == pytest.approx(
        moe.load_balancing_loss(rest, form=form), rel=1e-12)
    assert moe.load_balancing_loss(r, form=form, token_mask=~mask & ~known) == 0

    def value(logits):
        return moe.load_balancing_loss(moe.route(logits, 2, score=score, token_mask=known), form=form, token_mask=mask)

    check_gradients(value, logits, atol=1e-9)
    with pytest.raises(ValueError, match=r"load_balancing_loss: token_mask must have shape \(12,\), got \(4,\)"):
        moe.load_balancing_loss(r, token_mask=mask[:4])


def test_experts_choose_their_tokens():
    logits = normal(12, 4)
    mask = np.arange(12) != 5
    x = normal(12, 3)

    def value(z):
        r = moe.route_expert_choice(z, 3, token_mask=mask)
        return moe.combine(moe.dispatch(x, r), r)

    r = moe.route_expert_choice(logits, 3, token_mask=mask)
    assert (r.counts == 3).all() and (r.row[5] == -1).all()
    p = oracle.softmax(logits)
    for e in range(4):
        rows = r.source[r.offsets[e]: r.offsets[e + 1]]
        assert (rows == np.sort(np.argsort(np.where(mask, -p[:, e], 1), kind="stable")[:3])).all()
    check_gradients(value, logits, atol=1e-9)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_experts_take_a_token_that_is_not_finite_last_but_never_padding(wrong):
    logits = np.array([[1.0, 2], [wrong, 0], [0, 1], [5, 1]])
    mask = np.array([True, True, False, True])
    for capacity, taken in ((2, [True, False, False, True]), (3, mask), (4, mask)):
        index = moe.route_expert_choice(logits, capacity, token_mask=mask).expert_index
        np.testing.assert_array_equal(index, np.where(np.array(taken)[:, None], [0, 1], -1))


def experts(e, inner, d, dtype=np.float64):
    return normal(e, 2 * inner, d, dtype=dtype) / dtype(d**0.5), normal(e, d, inner, dtype=dtype) / dtype(inner**0.5)


@pytest.mark.parametrize("tokens, e, inner, d, k, capacity", [
    (1, 1, 1, 1, 1, None), (1, 8, 33, 16, 2, None), (2, 3, 16, 17, 3, None), (65, 8, 31, 33, 2, None),
    (130, 3, 97, 15, 2, None), (40, 64, 8, 8, 2, None), (33, 4, 16, 16, 2, 5), (5, 2, 513, 400, 1, None)])
def test_mlp_is_each_token_through_its_experts(tokens, e, inner, d, k, capacity):
    for dtype in np.float32, np.float64:
        x, (gate_up, down) = normal(tokens, d, dtype=dtype), experts(e, inner, d, dtype)
        r = moe.route(normal(tokens, e, dtype=dtype), k, capacity=capacity)
        y = moe.mlp(x, r, gate_up, down)
        expected = oracle.moe_mlp(x, r.weight, r.expert_index, gate_up, down, r.row >= 0)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 if dtype == np.float32 else 1e-13)


def test_mlp_bits_do_not_depend_on_threads_strides_or_company(threads):
    x, (gate_up, down) = normal(200, 70, dtype=np.float32), experts(5, 65, 70, np.float32)
    logits = normal(200, 5, dtype=np.float32) + np.array([2, 0, 0, 0, -9], np.float32)
    r = moe.route(logits, 2)
    whole = moe.mlp(x, r, gate_up, down)
    assert r.counts[4] == 0
    for t in 0, 77, 199:
        assert (moe.mlp(x[t: t + 1], moe.route(logits[t: t + 1], 2), gate_up, down) == whole[t]).all()
    some = slice(3, 12)
    assert (moe.mlp(x[some], moe.route(logits[some], 2), gate_up, down) == whole[some]).all()
    threads(1)
    assert (moe.mlp(np.asfortranarray(x), r, np.asfortranarray(gate_up), np.asfortranarray(down)) == whole).all()


def gradients(x, logits, gate_up, down, dy, options):
    leaves = [nf.Tensor(a, requires_grad=True) for a in (x, logits, gate_up, down)]
    moe.mlp(leaves[0], moe.route(leaves[1], **options), *leaves[2:]).backward(dy)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("options", [dict(top_k=2), dict(top_k=2, capacity=3, token_mask=np.arange(6) != 2)])
def test_mlp_gradients_are_the_slopes(options):
    def through_experts(x, logits, gate_up, down):
        return moe.mlp(x, moe.route(logits, **options), gate_up, down)

    check_gradients(through_experts, normal(6, 3), normal(6, 4), *experts(4, 5, 3), atol=1e-9)


def test_mlp_gradients_do_not_depend_on_threads_and_x_not_on_company(threads):
    x, logits, dy = (normal(90, n, dtype=np.float32) for n in (70, 5, 71))
    dy = dy[:, :70]
    gate_up, down = experts(5, 65, 70, np.float32)
    got = gradients(x, logits, gate_up, down, dy, dict(top_k=2))
    threads(1)
    for a, b in zip(got, gradients(x, logits, gate_up, down, dy, dict(top_k=2))):
        assert (a == b).all()
    alone = gradients(x[7:8], logits[7:8], gate_up, down, dy[7:8], dict(top_k=2))
    assert (alone[0] == got[0][7]).all() and (alone[1] == got[1][7]).all()


def test_mlp_gradients_match_torch():
    torch = pytest.importorskip("torch")
    x, logits, dy = (normal(40, n, dtype=np.float32) for n in (24, 6, 24))
    dy = normal(40, 24, seed=1, dtype=np.float32)
    gate_up, down = experts(6, 33, 24, np.float32)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, logits, gate_up, down)]
    tx, tl, tg, td = leaves
    top, index = torch.softmax(tl, 1).topk(2)
    top = top / top.sum(1, keepdim=True)
    h = torch.einsum("tkid,td->tki", tg[index], tx)
    gate, up = h.chunk(2, dim=-1)
    y = torch.einsum("tkdi,tki->tkd", td[index], torch.nn.functional.silu(gate) * up)
    (y * top[:, :, None]).sum(1).backward(torch.tensor(dy))
    for mine, leaf in zip(gradients(x, logits, gate_up, down, dy, dict(top_k=2)), leaves):
        np.testing.assert_allclose(mine, leaf.grad.numpy(), rtol=0, atol=5e-6)


def test_bad_experts_are_named():
    r, x = moe.route(np.zeros((3, 4)), 2), np.zeros((3, 6))
    gate_up, down = np.zeros((4, 10, 6)), np.zeros((4, 6, 5))
    for bad in np.zeros((4, 10, 5)), np.zeros((3, 10, 6)), np.zeros((4, 9, 6)), np.zeros((10, 6)):
        with pytest.raises(ValueError, match="mlp: gate_up must have"):
            moe.mlp(x, r, bad, down)
    for bad in np.zeros((4, 5, 6)), np.zeros((5, 6, 5)), np.zeros(4):
        with pytest.raises(ValueError, match="mlp: down must have"):
            moe.mlp(x, r, gate_up, bad)
    with pytest.raises(ValueError, match="activation"):
        moe.mlp(x, r, gate_up, down, activation="relu")
    with pytest.raises(TypeError, match="same dtype"):
        moe.mlp(x, r, gate_up.astype(np.float32), down)
    for bad in np.zeros((2, 6)), np.zeros((1, len(x), 6)), np.zeros(6):
        with pytest.raises(ValueError, match=rf"mlp: x must have shape \({len(x)}, d\)"):
            moe.mlp(bad, r, gate_up, down)


def test_no_token_at_all():
    y = moe.mlp(np.zeros((0, 6)), moe.route(np.zeros((0, 4)), 2), np.zeros((4, 10, 6)), np.zeros((4, 6, 5)))
    assert y.shape == (0, 6)
    r = moe.route(np.zeros((0, 4), np.float32), 2)
    x = nf.Tensor(np.zeros((0, 6), np.float32), requires_grad=True)
    y = moe.combine(moe.dispatch(x, r), r)
    assert y.data.shape == (0, 6)
    y.backward(np.zeros((0, 6), np.float32))
    assert x.grad.shape == (0, 6)
    assert moe.load_balancing_loss(r) == 0 and moe.router_z_loss(np.zeros((0, 4))) == 0


@pytest.mark.parametrize("options, error, message", [
    (dict(top_k=0), ValueError, "top_k"),
    (dict(top_k=5), ValueError, "top_k"),
    (dict(top_k=2, score="relu"), ValueError, "score"),
    (dict(top_k=2, num_groups=3), ValueError, "num_groups"),
    (dict(top_k=2, num_groups=4, top_groups=1), ValueError, "top_groups"),
    (dict(top_k=2, bias=np.zeros(3)), ValueError, "bias"),
    (dict(top_k=2, bias=np.zeros(4, np.float32)), TypeError, "bias"),
    (dict(top_k=2, token_mask=np.ones(3)), TypeError, "token_mask"),
    (dict(top_k=2, token_mask=np.ones(2, bool)), ValueError, "token_mask"),
    (dict(top_k=2, capacity=-1), ValueError, "capacity"),
    (dict(top_k=2.0), TypeError, "route: top_k must be an integer, got 2.0"),
    (dict(top_k=2, capacity=1.5), TypeError, "route: capacity must be an integer, got 1.5"),
    (dict(top_k=2, scale="2"), TypeError, "route: scale must be a real number, got .2."),
])
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        moe.route(np.zeros((3, 4)), **options)


def test_errors_of_expert_choice_say_its_name():
    with pytest.raises(TypeError, match="route_expert_choice: capacity must be an integer"):
        moe.route_expert_choice(np.zeros((3, 4)), 1.5)
    with pytest.raises(ValueError, match=r"route_expert_choice: token_mask must have shape \(3,\), got \(2,\)"):
        moe.route_expert_choice(np.zeros((3, 4)), 1, token_mask=np.ones(2, bool))


def test_bad_arrays_are_named():
    r = moe.route(np.zeros((3, 4)), 2)
    with pytest.raises(ValueError, match="logits"):
        moe.route(np.zeros(4), 2)
    with pytest.raises(TypeError, match="float32 or float64"):
        moe.route(np.zeros((3, 4), int), 2)
    with pytest.raises(ValueError, match=r"dispatch: x must have shape \(3, 5\)"):
        moe.dispatch(np.zeros((4, 5)), r)
    with pytest.raises(ValueError, match=r"combine: y must have shape \(6, 5\)"):
        moe.combine(np.zeros((3, 5)), r)
    with pytest.raises(TypeError, match="same dtype"):
        moe.combine(np.zeros((6, 5), np.float32), r)
    with pytest.raises(ValueError, match="form"):
        moe.load_balancing_loss(r, form="gshard")
    r.row[0, 0] = 1000
    with pytest.raises(ValueError, match="contradict"):
        moe.dispatch(np.zeros((3, 5)), r)


def test_what_is_no_routing_is_refused_by_name():
    x = np.zeros((3, 4))
    for name, call in (("dispatch", lambda: moe.dispatch(x, x)), ("combine", lambda: moe.combine(x, None)),
                       ("mlp", lambda: moe.mlp(x, x, np.zeros((4, 2, 4)), np.zeros((4, 4, 1)))),
                       ("load_balancing_loss", lambda: moe.load_balancing_loss(x))):
        with pytest.raises(TypeError, match=f"{name}: routing must be a Routing, as route gives it, got "):
            call()


def test_a_token_without_experts_has_no_weight_and_no_gradient():
    logits = nf.Tensor(np.array([[-np.inf, -np.inf], [0, 1]]), requires_grad=True)
    routing = moe.route(logits, 2)
    assert (routing.weight.data[0] == 0).all() and (routing.probabilities.data[0] == 0).all()
    (routing.weight * np.array([[1.0, 2], [3, 5]])).sum().backward()
    assert (logits.grad[0] == 0).all() and (logits.grad[1] != 0).all()


def test_router_z_loss_refuses_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match=r"token_mask must have shape \(3,\), got \(1,\)"):
        moe.router_z_loss(np.zeros((3, 2)), token_mask=np.array([True]))


@pytest.mark.parametrize(("name", "count"), [
    ("moe_route", 10), ("moe_route_backward", 10), ("moe_sort", 3), ("moe_dispatch", 2), ("moe_dispatch_backward", 2),
    ("moe_combine", 3), ("moe_combine_backward", 4), ("moe_swiglu_backward", 4)])
def test_none_in_place_of_an_array_is_a_type_error(name, count):
    with pytest.raises(TypeError, match=r"must be|is required"):
        getattr(nf._core, name)(*[None] * count)
