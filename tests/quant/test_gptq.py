import numpy as np
import pytest

from numformer import quant
from numformer.quant import QuantSpec
from tests.gradients import normal

SPEC = QuantSpec(4, 64)


def correlated(rows, k, seed=0):
    """Activations that live near a subspace of k/10 dimensions, some columns much larger than others."""
    rng = np.random.default_rng(1)
    basis, size = rng.standard_normal((k // 10, k)), np.exp(rng.standard_normal(k))
    rng = np.random.default_rng([2, seed])
    x = rng.standard_normal((rows, k // 10)) @ basis / np.sqrt(k // 10) + 0.2 * rng.standard_normal((rows, k))
    return (x * size).astype(np.float32)


def test_output_error_is_far_below_rounding_and_order_helps():
    w, x, held_out = normal(96, 256, dtype=np.float32), correlated(1024, 256), correlated(512, 256, seed=1)
    _, rounding = quant.rtn(w, SPEC, held_out)
    _, plain = quant.gptq(w, x, SPEC, act_order=False, held_out=held_out)
    _, ordered = quant.gptq(w, x, SPEC, held_out=held_out)
    assert plain.output_error < 0.6 * rounding.output_error
    assert ordered.output_error < plain.output_error
    assert plain.weight_error > rounding.weight_error          # which is why it is not the judge
    assert {plain.output_error_on, rounding.output_error_on} == {"held-out"}


def test_white_activations_leave_nothing_to_gain():
    """With H = I no column can make good for another: GPTQ is rounding, to the bit."""
    w, x = normal(20, 64, dtype=np.float32), np.vstack([np.eye(64), -np.eye(64)])
    for act_order in (False, True):
        q, _ = quant.gptq(w, x, SPEC, act_order=act_order, damp=0)
        assert (q.integers == quant.quantize(w, SPEC).integers).all()


def test_is_the_column_by_column_algorithm():
    """Against the formula without blocks or factors: after column i, the rest moves by -e H^-1[i, :] / H^-1[i, i]."""
    w, x = normal(10, 40), correlated(300, 40).astype(float)
    spec = QuantSpec(4, None, scale_dtype="float32")
    scale = quant.quantize(w, spec).scales.astype(float)
    hessian = 2 / 300 * x.T @ x
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(40)
    want, left = w.copy(), list(range(40))
    for i in range(40):
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        q = np.clip(np.rint(want[:, i:i + 1] / scale), -8, 7) * scale
        error = (want[:, i:i + 1] - q) / inverse[0, 0]
        want[:, left] -= error * inverse[0]
        want[:, i:i + 1] = q
        left = left[1:]
    q, _ = quant.gptq(w, x, spec, act_order=False)
    np.testing.assert_allclose(q.dequantize(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 32, 50])
@pytest.mark.parametrize("symmetric", [True, False])
def test_block_size_changes_nothing_of_note(group_size, symmetric):
    w, x = normal(16, 130), correlated(400, 130)
    spec = QuantSpec(4, group_size, symmetric)
    for static in (True, False):
        results = [quant.gptq(w, x, spec, block_size=size, act_order=False, static_groups=static)[0]
                   for size in (1, 7, 64, 128, 1000)]
        for q in results[1:]:
            assert (q.scales == results[0].scales).mean() > 0.98
            assert (q.integers == results[0].integers).mean() > 0.98


def test_dead_columns_are_zero_and_counted():
    w, x = normal(8, 64, dtype=np.float32), correlated(200, 64)
    x[:, [3, 40]] = 0
    q, report = quant.gptq(w, x, SPEC)
    assert report.dead_columns == 2 and (q.dequantize()[:, [3, 40]] == 0).all()


def test_damping_rises_until_there_is_a_factor_and_is_reported():
    w = normal(8, 64, dtype=np.float32)
    few = correlated(3, 64)
    q, report = quant.gptq(w, few, SPEC, damp=0)
    assert report.damp > 0 and np.isfinite(q.dequantize()).all()
    assert quant.gptq(w, correlated(500, 64), SPEC)[1].damp == 0.01


def test_report_says_what_was_measured():
    w, x = normal(12, 64, dtype=np.float32), correlated(100, 64)
    q, report = quant.gptq(w, x, SPEC)
    wide, deq = w.astype(float), q.dequantize().astype(float)
    assert report.method == "gptq" and report.output_error_on == "calibration"
    assert report.bits_per_weight == q.bits_per_weight == 4.25
    assert report.weight_error == pytest.approx(np.linalg.norm(wide - deq) / np.linalg.norm(wide))
    assert report.output_error == pytest.approx(np.linalg.norm(x @ (wide - deq).T) / np.linalg.norm(x @ wide.T))
    _, rounding = quant.rtn(w, SPEC)
    assert rounding.output_error is None and rounding.output_error_on is None and rounding.method == "rtn"


def test_leaves_its_inputs_alone():
    w, x = normal(8, 64), correlated(100, 64)
    before = w.copy(), x.copy()
    x[:, 5] = before[1][:, 5] = 0
    quant.gptq(w, x, SPEC)
    assert (w == before[0]).all() and (x == before[1]).all()


def test_bad_inputs_are_named():
    w, x = normal(8, 64), correlated(100, 64)
    with pytest.raises(ValueError, match=r"activations must have shape \(rows, 64\), .* got \(100, 63\)"):
        quant.gptq(w, x[:, :63], SPEC)
    with pytest.raises(ValueError, match=r"held_out must have shape"):
        quant.gptq(w, x, SPEC, held_out=x[:0])
    broken = x.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="activations must be finite"):
        quant.gptq(w, broken, SPEC)
    with pytest.raises(ValueError, match=r"rtn: activations must have shape"):
        quant.rtn(w, SPEC, x[:, :3])
    with pytest.raises(ValueError, match="damp must be 0 or more"):
        quant.gptq(w, x, SPEC, damp=-1)
    with pytest.raises(ValueError, match="block_size must be 1 or more"):
        quant.gptq(w, x, SPEC, block_size=0)
    with pytest.raises(TypeError, match="gptq: damp must be a real number, got '1'"):
        quant.gptq(w, x, SPEC, damp="1")
    with pytest.raises(TypeError, match=r"gptq: block_size must be an integer, got 2\.5"):
        quant.gptq(w, x, SPEC, block_size=2.5)
    with pytest.raises(ValueError, match="act_order needs static_groups"):
        quant.gptq(w, x, SPEC, act_order=True, static_groups=False)
    with pytest.raises(TypeError, match="spec must be a QuantSpec"):
        quant.gptq(w, x, None)
