"""The plain functions against loops in float64, against torch, and under junk in masked slots."""
import math

import numpy as np
import pytest

import numformer as nf
from numformer import rlhf
from tests.gradients import check_gradients

SHAPES = [(1, 1), (3, 5), (4, 17), (2, 33)]
JUNK = [np.nan, np.inf, -np.inf, 1e9]


def arrays(count, shape, dtype=np.float64, seed=0):
    """`count` arrays, and a right-padded mask with a full row and, where there are more, an empty one."""
    rng = np.random.default_rng([seed, *shape])
    lengths = rng.integers(1, shape[1] + 1, shape[0])
    lengths[0] = shape[1]
    if shape[0] > 2:
        lengths[1] = 0
    mask = np.arange(shape[1]) < lengths[:, None]
    return [rng.standard_normal(shape).astype(dtype) for _ in range(count)], mask


def kept(x, mask):
    return [float(v) for v, m in zip(np.ravel(x), np.ravel(mask)) if m]


def mean(xs):
    return math.fsum(xs) / max(len(xs), 1)


def variance(xs, ddof=0):
    return math.fsum((x - mean(xs)) ** 2 for x in xs) / max(len(xs) - ddof, 1)


def loop_gae(rewards, values, mask, gamma, lam):
    """A_t as the sum of (gamma lam)^k delta_(t+k) over the slots that count, straight from the definition."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for row in range(len(rewards)):
        slots = np.flatnonzero(mask[row])
        v = [*values[row, slots].astype(float), 0.0]
        delta = [float(rewards[row, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(slots)]
        for i, t in enumerate(slots):
            advantages[row, t] = math.fsum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(slots)))
            returns[row, t] = advantages[row, t] + v[i]
    return advantages, returns


def loop_policy_loss(logp, old, advantages, mask, clip, dual_clip):
    slots, kl, clipped, ratios = [], [], [], []
    for x, o, a in zip(kept(logp, mask), kept(old, mask), kept(advantages, mask)):
        ratio = math.exp(x - o)
        plain, bounded = -a * ratio, -a * min(max(ratio, 1 - clip), 1 + clip)
        slot = max(plain, bounded)
        if dual_clip and a < 0:
            slot = min(slot, -a * dual_clip)
        slots.append(slot)
        kl.append((x - o) ** 2 / 2)
        clipped.append(bounded > plain)
        ratios.append(ratio)
    return mean(slots), {"loss/policy_avg": mean(slots), "policy/approxkl_avg": mean(kl),
                         "policy/clipfrac_avg": mean(clipped), "val/ratio": mean(ratios),
                         "val/ratio_var": variance(ratios)}


def loop_value_loss(values, old, returns, mask, clip):
    slots, clipped = [], []
    for v, o, r in zip(kept(values, mask), kept(old, mask), kept(returns, mask)):
        bounded = v if clip is None else min(max(v, o - clip), o + clip)
        slots.append(max((v - r) ** 2, (bounded - r) ** 2) / 2)
        clipped.append((bounded - r) ** 2 > (v - r) ** 2)
    return mean(slots), {"loss/value_avg": mean(slots), "val/clipfrac_avg": mean(clipped)}


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def approx(expected, dtype=np.float64):
    rel, near = (1e-10, 1e-12) if dtype == np.float64 else (2e-5, 1e-6)
    return pytest.approx(expected, rel=rel, abs=near)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstLoops:
    def test_mean_and_sum(self, shape, dtype):
        (x,), mask = arrays(1, shape, dtype)
        assert rlhf.masked_mean(x, mask) == approx(mean(kept(x, mask)), dtype)
        assert rlhf.masked_sum(x, mask) == approx(math.fsum(kept(x, mask)), dtype)
        np.testing.assert_allclose(rlhf.masked_mean(x, mask, axis=1), [mean(kept(*row)) for row in zip(x, mask)],
                                   rtol=1e-5, atol=1e-6)
        assert rlhf.masked_mean(x, mask, axis=1).dtype == dtype

    @pytest.mark.parametrize("unbiased", [False, True])
    @pytest.mark.parametrize("shift_mean", [False, True])
    def test_whitening(self, shape, dtype, shift_mean, unbiased):
        (x,), mask = arrays(1, shape, dtype)
        ours = rlhf.masked_whiten(x, mask, shift_mean, unbiased=unbiased)
        xs = kept(x, mask)
        scale = 1 / math.sqrt(variance(xs, unbiased) + 1e-8)
        expected = [(v - mean(xs)) * scale + (0 if shift_mean else mean(xs)) for v in xs]
        np.testing.assert_allclose(ours[mask], expected, rtol=2e-5 if dtype == np.float32 else 1e-10, atol=2e-6)
        assert ours.dtype == dtype and not ours[~mask].any()

    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)])
    def test_gae(self, shape, dtype, gamma, lam):
        (rewards, values), mask = arrays(2, shape, dtype)
        if shape[1] > 4:
            mask[0, 2:4] = False            # a gap: the slots beside it are neighbours
        ours = rlhf.gae(rewards, values, mask, gamma=gamma, lam=lam)
        for a, b in zip(ours, loop_gae(rewards, values, mask, gamma, lam)):
            np.testing.assert_allclose(a, b, rtol=1e-4 if dtype == np.float32 else 1e-10, atol=1e-5)
            assert a.dtype == dtype and not a[~mask].any()

    def test_kl(self, shape, dtype):
        (p, q), mask = arrays(2, shape, dtype)
        d = p.astype(float) - q
        for form, expected in (("k1", d), ("k2", d * d / 2), ("k3", np.exp(-d) - 1 + d)):
            ours = rlhf.kl_penalty(p, q, form)
            np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)
            np.testing.assert_array_equal(rlhf.kl_penalty(p, q, form, mask), np.where(mask, ours, 0))

    @pytest.mark.parametrize(("clip", "dual_clip"), [(0.2, None), (0.05, None), (0.2, 1.5)])
    def test_policy_loss(self, shape, dtype, clip, dual_clip):
        (logp, old, advantages), mask = arrays(3, shape, dtype)
        old = (logp + 0.3 * old).astype(dtype)
        loss, metrics = rlhf.ppo_policy_loss(logp, old, advantages, mask, clip=clip, dual_clip=dual_clip)
        expected, named = loop_policy_loss(logp, old, advantages, mask, clip, dual_clip)
        assert loss == approx(expected, dtype) and metrics == approx(named, dtype)

    @pytest.mark.parametrize("clip", [0.2, 5.0, None])
    def test_value_loss(self, shape, dtype, clip):
        (values, old, returns), mask = arrays(3, shape, dtype)
        loss, metrics = rlhf.ppo_value_loss(values, old, returns, mask, clip=clip)
        expected, named = loop_value_loss(values, old, returns, mask, clip)
        assert loss == approx(expected, dtype) and metrics == approx(named, dtype)

    def test_explained_variance(self, shape, dtype):
        (values, returns), mask = arrays(2, shape, dtype)
        r, v = kept(returns, mask), kept(values, mask)
        total = variance(r)
        expected = 0.0 if total == 0 else 1 - variance([a - b for a, b in zip(r, v)]) / total
        assert rlhf.explained_variance(values, returns, mask) == approx(expected, dtype)
        assert rlhf.explained_variance(returns, returns, mask) == (0.0 if total == 0 else 1.0)

    def test_losses_of_pairs(self, shape, dtype):
        (x,), _ = arrays(1, (4, shape[1]), dtype)
        x *= 3
        pairs = list(zip(*x.astype(float)))
        margin = np.abs(x[2])
        assert rlhf.reward_model_loss(x[0], x[1]) == approx(mean([-log_sigmoid(c - r) for c, r, *_ in pairs]), dtype)
        assert rlhf.reward_model_loss(x[0], x[1], margin, centering=0.01) == approx(
            mean([-log_sigmoid(c - r - m) for (c, r, *_), m in zip(pairs, margin)])
            + 0.01 * mean([(c + r) ** 2 for c, r, *_ in pairs]), dtype)
        assert rlhf.reward_accuracy(x[0], x[1]) == approx(mean([c > r for c, r, *_ in pairs]), dtype)
        for smoothing in (0.0, 0.2):
            d = [0.3 * ((a - c) - (b - e)) for a, b, c, e in pairs]
            assert rlhf.dpo_loss(*x, 0.3, label_smoothing=smoothing) == approx(
                mean([-(1 - smoothing) * log_sigmoid(y) - smoothing * log_sigmoid(-y) for y in d]), dtype)

    def test_grpo(self, shape, dtype):
        (x,), _ = arrays(1, (1, 12), dtype, seed=shape[1])
        labels = np.array([3, 1, 1, 3, 3, 7, 7, 7, 1, 3, 1, 5])
        for group, member in ((4, np.arange(12) // 4), (labels, labels)):
            for unbiased in (True, False):
                ours = rlhf.grpo_advantages(x[0], group, unbiased=unbiased)
                for i, label in enumerate(member):
                    r = [float(v) for v, m in zip(x[0], member) if m == label]
                    expected = (float(x[0, i]) - mean(r)) / (math.sqrt(variance(r, unbiased)) + 1e-4)
                    assert ours[i] == approx(expected, dtype)
                assert ours.dtype == dtype


def test_k3_is_never_negative_and_exact_near_zero():
    d = np.array([0, 1e-9, -1e-9, 1e-5, -3e-8, 40])
    ours = rlhf.kl_penalty(d, np.zeros(6), "k3")
    np.testing.assert_allclose(ours[:5], d[:5] ** 2 / 2, rtol=1e-4, atol=1e-24)
    assert (ours >= 0).all() and ours[5] == pytest.approx(39)


def test_adaptive_kl_follows_its_formula_and_its_bounds():
    ours = rlhf.AdaptiveKL(0.15, 6, 10000)
    value = 0.15
    for kl, error in ((6, 0), (6.6, 0.1), (60, 0.2), (3, -0.2), (5.4, -0.1), (-1, -0.2)):
        value *= 1 + error * 512 / 10000
        assert ours.update(kl, 512) == ours.value == pytest.approx(value, rel=1e-12)
    fixed = rlhf.AdaptiveKL(0.05)
    assert fixed.update(100, 64) == 0.05
    with pytest.raises(ValueError, match="kl must be finite, got nan"):
        ours.update(np.nan, 1)
    with pytest.raises(ValueError, match="init must be 0 or more, got -1"):
        rlhf.AdaptiveKL(-1)
    with pytest.raises(ValueError, match="above 0, got 0 and 5"):
        rlhf.AdaptiveKL(1, 0, 5)
    short = rlhf.AdaptiveKL(1, 6, 10)
    assert 0 < short.update(0, 49) < 0.03
    with pytest.raises(ValueError, match=r"n must be below 5 horizons, 5 \* 10, got 50; .* a longer horizon"):
        short.update(0, 50)         # would be 0, and below 0 beyond
    for wrong in ("4", None, np.array([1, 2])):
        with pytest.raises(TypeError, match="AdaptiveKL: n must be a real number, got"):
            short.update(0, wrong)
    assert type(short.update(nf.Tensor(np.float32(1)), nf.Tensor(np.array(2)))) is type(short.value) is float


def test_groups_of_equal_rewards_or_one_member_have_no_advantage():
    np.testing.assert_array_equal(rlhf.grpo_advantages(np.full(6, 0.7), 3), 0)
    np.testing.assert_array_equal(rlhf.grpo_advantages(np.array([1.0, 5.0]), 1), 0)


# Gradients

SLOTTED = {
    "masked_mean": (1, lambda m, x: rlhf.masked_mean(x, m)),
    "masked_mean of rows": (1, lambda m, x: rlhf.masked_mean(x, m, axis=1)),
    "masked_sum": (1, lambda m, x: rlhf.masked_sum(x, m)),
    "masked_whiten": (1, lambda m, x: rlhf.masked_whiten(x, m)),
    "masked_whiten, mean kept": (1, lambda m, x: rlhf.masked_whiten(x, m, False, unbiased=True)),
    "kl k1": (2, lambda m, p, q: rlhf.kl_penalty(p, q, "k1", m)),
    "kl k2": (2, lambda m, p, q: rlhf.kl_penalty(p, q, "k2", m)),
    "kl k3": (2, lambda m, p, q: rlhf.kl_penalty(p, q, "k3", m)),
    "policy": (3, lambda m, x, old, a: rlhf.ppo_policy_loss(x, old, a, m)),
    "policy, dual clip": (3, lambda m, x, old, a: rlhf.ppo_policy_loss(x, old, a, m, dual_clip=1.2)),
    "value": (3, lambda m, v, old, r: rlhf.ppo_value_loss(v, old, r, m)),
    "value without clip": (3, lambda m, v, old, r: rlhf.ppo_value_loss(v, old, r, m, clip=None)),
    "gae": (2, lambda m, r, v: rlhf.gae(r, v, m)),
    "explained_variance": (2, lambda m, v, r: rlhf.explained_variance(v, r, m)),
}


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", [name for name in SLOTTED if name not in ("gae", "explained_variance")])
def test_gradients_by_finite_differences(name):
    count, function = SLOTTED[name]
    xs, mask = arrays(count, (3, 5))
    if name.startswith(("policy", "value")):        # differentiated through the first argument alone
        xs[1] = xs[0] + 0.3 * xs[1]
        check_gradients(lambda x: first(function(mask, x, *xs[1:])), xs[0])
    else:
        check_gradients(lambda *x: function(mask, *x), *xs)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SLOTTED)
def test_masked_slots_change_no_bit(name, dtype, junk):
    count, function = SLOTTED[name]
    xs, mask = arrays(count, (4, 17), dtype)

    def run(*xs):
        tensors = [nf.Tensor(x, requires_grad=True) for x in xs]
        y = function(mask, *tensors)
        loss = first(y)
        if type(loss) is nf.Tensor:
            loss.backward(np.ones_like(loss.data))
        values = [v.data if type(v) is nf.Tensor else v for v in (y if isinstance(y, tuple) else (y,))]
        return values + [t.grad for t in tensors]

    clean = run(*[np.where(mask, x, dtype(0)) for x in xs])
    dirty = run(*[np.where(mask, x, dtype(junk)) for x in xs])
    for a, b in zip(clean, dirty):
        if a is None or isinstance(a, dict):
            assert a == b
        else:
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
            assert np.isfinite(a).all()
    for gradient in dirty[-count:]:
        assert gradient is None or not gradient[~mask].any()


@pytest.mark.parametrize("name", SLOTTED)
def test_with_every_slot_masked_all_is_zero(name):
    count, function = SLOTTED[name]
    xs = [nf.Tensor(np.full((2, 3), np.nan), requires_grad=True) for _ in range(count)]
    y = function(np.zeros((2, 3), bool), *xs)
    for value in y if isinstance(y, tuple) else (y,):
        if isinstance(value, dict):
            assert set(value.values()) == {0.0}
        else:
            np.testing.assert_array_equal(value.data if type(value) is nf.Tensor else value, 0)
    if type(first(y)) is nf.Tensor:
        first(y).backward(np.ones_like(first(y).data))
        assert all(x.grad is None or not x.grad.any() for x in xs)


@pytest.mark.parametrize("name", SLOTTED)
def test_arrays_in_arrays_out_and_a_mask_of_ones_and_zeros_will_do(name):
    count, function = SLOTTED[name]
    xs, mask = arrays(count, (3, 5))
    y, again = first(function(mask, *xs)), first(function(mask.astype(np.float32), *xs))
    assert type(y) is not nf.Tensor
    np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_losses_have_torchs_gradients(dual_clip):
    torch = pytest.importorskip("torch")
    (x, old, a), mask = arrays(3, (4, 17))
    old = x + 0.4 * old
    ours = nf.Tensor(x, requires_grad=True)
    rlhf.ppo_policy_loss(ours, old, a, mask, dual_clip=dual_clip)[0].backward()
    theirs, o, adv, m = torch.tensor(x, requires_grad=True), *(torch.tensor(v) for v in (old, a, mask))
    ratio = torch.exp(theirs - o)
    slots = torch.max(-adv * ratio, -adv * torch.clamp(ratio, 0.8, 1.2))
    if dual_clip:
        slots = torch.where(adv < 0, torch.min(slots, -adv * dual_clip), slots)
    slots[m].mean().backward()
    np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)

    ours = nf.Tensor(x, requires_grad=True)
    rlhf.ppo_value_loss(ours, old, a, mask)[0].backward()
    theirs = torch.tensor(x, requires_grad=True)
    bounded = torch.clamp(theirs, o - 0.2, o + 0.2)
    (0.5 * torch.max((theirs - adv) ** 2, (bounded - adv) ** 2)[m].mean()).backward()
    np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)

    leaves = [nf.Tensor(v, requires_grad=True) for v in x]
    twins = [torch.tensor(v, requires_grad=True) for v in x]
    (rlhf.dpo_loss(*leaves) + rlhf.reward_model_loss(leaves[0], leaves[1], 0.5)).backward()
    c, r, ref_c, ref_r = twins
    sigmoid = torch.nn.functional.logsigmoid
    (-sigmoid(0.1 * ((c - r) - (ref_c - ref_r).detach())).mean() - sigmoid(c - r - 0.5).mean()).backward()
    for p, q in zip(leaves[:2], twins[:2]):
        np.testing.assert_allclose(p.grad, q.grad, rtol=1e-12, atol=1e-15)
    assert leaves[2].grad is None                  # the reference is a constant


def test_a_first_step_has_the_ratio_one_and_the_whole_gradient():
    (x, a), mask = arrays(2, (4, 17), np.float32)
    ours = nf.Tensor(x, requires_grad=True)
    loss, metrics = rlhf.ppo_policy_loss(ours, x, a, mask)
    loss.backward()
    assert metrics["val/ratio"] == 1.0 and metrics["val/ratio_var"] == 0.0 and metrics["policy/clipfrac_avg"] == 0.0
    np.testing.assert_allclose(ours.grad, np.where(mask, -a / mask.sum(), 0), rtol=1e-6)


def test_numbers_of_numpy_do_as_numbers_of_python_do():
    (a, b, c), mask = arrays(3, (4, 17), np.float32)
    calls = [lambda number: rlhf.gae(a, b, mask, gamma=number(0.99), lam=number(0.9)),
             lambda number: rlhf.masked_whiten(a, mask, eps=number(1e-3)),
             lambda number: rlhf.ppo_policy_loss(a, b, c, mask, clip=number(0.1), dual_clip=number(1.5))[0],
             lambda number: rlhf.ppo_policy_loss(nf.Tensor(a), b, c, mask, dual_clip=number(1.5))[0].data,
             lambda number: rlhf.ppo_value_loss(a, b, c, mask, clip=number(0.1))[0],
             lambda number: rlhf.reward_model_loss(a, b, np.full_like(a, 0.1), centering=number(0.1)),
             lambda number: rlhf.reward_model_loss(nf.Tensor(a), b, number(0.1)).data,
             lambda number: rlhf.reward_model_loss(a, b, number(0.1)),
             lambda number: rlhf.dpo_loss(a, b, c, a, beta=number(0.3), label_smoothing=number(0.1)),
             lambda number: rlhf.grpo_advantages(a[0, :16], 4, eps=number(1e-3))]
    for call in calls:
        expected = call(float)
        for number in (np.float64, np.asarray):
            for x, y in zip(np.atleast_2d(call(number)), np.atleast_2d(expected), strict=True):
                assert x.dtype == np.float32
                np.testing.assert_array_equal(x, y)


# Bad input

A, B = np.zeros((2, 3)), np.zeros((2, 4))
M = np.ones((2, 3), bool)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: rlhf.gae(A, B, M), ValueError, r"gae: rewards and values .* \(2, 3\) and \(2, 4\)"),
    (lambda: rlhf.gae(A, A, M[:, :2]), ValueError, r"gae: rewards and mask .* \(2, 3\) and \(2, 2\)"),
    (lambda: rlhf.gae(A[0], A[0], M[0]), ValueError, r"must have shape \(B, T\), got \(3,\)"),
    (lambda: rlhf.gae(A, A, M, gamma=1.5), ValueError, "within 0 .. 1, got 1.5 and 0.95"),
    (lambda: rlhf.gae(A, A.astype("f4"), M), TypeError, "rewards float64, values float32; convert with"),
    (lambda: rlhf.masked_mean(np.zeros((2, 3), int), M), TypeError, "masked_mean: .* got x int64"),
    (lambda: rlhf.masked_mean(A, A + 0.5), ValueError, "mask must be boolean, .* got float64 with other values"),
    (lambda: rlhf.masked_sum(A, M[0]), ValueError, r"masked_sum: x and mask .* \(2, 3\) and \(3,\)"),
    (lambda: rlhf.masked_whiten(A, M[0]), ValueError, r"masked_whiten: x and mask .* \(2, 3\) and \(3,\)"),
    (lambda: rlhf.explained_variance(A, B, M), ValueError, r"values and returns .* \(2, 3\) and \(2, 4\)"),
    (lambda: rlhf.kl_penalty(A, B), ValueError, r"logp and logp_ref .* \(2, 3\) and \(2, 4\)"),
    (lambda: rlhf.kl_penalty(A, A, "k4"), ValueError, 'form must be "k1", "k2" or "k3", got \'k4\''),
    (lambda: rlhf.ppo_policy_loss(A, A, B, M), ValueError, r"logp and advantages .* \(2, 3\) and \(2, 4\)"),
    (lambda: rlhf.ppo_policy_loss(A, A, A, M.T), ValueError, r"logp and mask .* \(2, 3\) and \(3, 2\)"),
    (lambda: rlhf.ppo_policy_loss(A, A, A, M, clip=0), ValueError, "clip must be above 0, got 0"),
    (lambda: rlhf.ppo_policy_loss(A, A, A, M, dual_clip=1), ValueError, "dual_clip must be above 1, got 1"),
    (lambda: rlhf.ppo_value_loss(A, B, A, M), ValueError, r"values and old_values .* \(2, 3\) and \(2, 4\)"),
    (lambda: rlhf.ppo_value_loss(A, A, A, M, clip=-1), ValueError, "clip must be above 0 or None, got -1"),
    (lambda: rlhf.reward_model_loss(A[0], B[0]), ValueError, r"chosen and rejected .* \(3,\) and \(4,\)"),
    (lambda: rlhf.reward_model_loss(A[0], A[0], B[0]), ValueError, r"chosen and margin .* \(3,\) and \(4,\)"),
    (lambda: rlhf.reward_accuracy(A[0], B[0]), ValueError, r"chosen and rejected .* \(3,\) and \(4,\)"),
    (lambda: rlhf.dpo_loss(A[0], A[0], A[0], B[0]), ValueError, r"policy_chosen and ref_rejected .* \(3,\) and \(4,\)"),
    (lambda: rlhf.dpo_loss(A[0], A[0], A[0], A[0], 0), ValueError, "beta must be above 0, got 0"),
    (lambda: rlhf.dpo_loss(A[0], A[0], A[0], A[0], label_smoothing=0.6), ValueError, "within 0 .. 0.5, got 0.6"),
    (lambda: rlhf.grpo_advantages(A[0], 2), ValueError, "3 rewards are no whole number of groups of 2"),
    (lambda: rlhf.grpo_advantages(A, 2), ValueError, r"must have shape \(N,\), got \(2, 3\)"),
    (lambda: rlhf.grpo_advantages(A[0], 1.0), TypeError, "must be an integer or integers, got float64"),
    (lambda: rlhf.gae(A, A, M, lam=None), TypeError, "gae: lam must be a real number, got None"),
    (lambda: rlhf.masked_whiten(A, M, eps="0"), TypeError, "masked_whiten: eps must be a real number"),
    (lambda: rlhf.ppo_policy_loss(A, A, A, M, clip=None), TypeError, "ppo_policy_loss: clip must be a real number"),
    (lambda: rlhf.ppo_value_loss(A, A, A, M, clip="1"), TypeError, "ppo_value_loss: clip must be a real number"),
    (lambda: rlhf.reward_model_loss(A[0], A[0], "1"), TypeError, "reward_model_loss: margin must be of real numbers"),
    (lambda: rlhf.reward_model_loss(A[0], A[0], centering="1"), TypeError, "reward_model_loss: centering must be a"),
    (lambda: rlhf.dpo_loss(A[0], A[0], A[0], A[0], "1"), TypeError, "dpo_loss: beta must be a real number"),
    (lambda: rlhf.dpo_loss(A[0], A[0], A[0], A[0], label_smoothing="0"), TypeError, "dpo_loss: label_smoothing must"),
    (lambda: rlhf.AdaptiveKL("1"), TypeError, "AdaptiveKL: init must be a real number"),
    (lambda: rlhf.AdaptiveKL(1, "1"), TypeError, "AdaptiveKL: target must be a real number"),
    (lambda: rlhf.AdaptiveKL(1).update("1", 2), TypeError, "AdaptiveKL: kl must be a real number"),
    (lambda: rlhf.grpo_advantages(A[0], np.arange(4)), ValueError, r"rewards and group .* \(3,\) and \(4,\)"),
])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
