import numpy as np
import pytest

import numformer as nf
from numformer import nn


def layer(**options):
    return nn.MoE(8, 6, **{"n_expert": 4, "top_k": 2, "rng": np.random.default_rng(0), "dtype": np.float64} | options)


def test_a_token_is_the_weighted_sum_of_what_its_experts_say():
    moe, x = layer(), np.random.default_rng(1).standard_normal((2, 5, 8))
    y = moe(x).data
    for token, out in zip(x.reshape(-1, 8), y.reshape(-1, 8)):
        scores = np.exp(moe.router.data @ token)
        chosen = np.argsort(-scores)[:2]
        expected = 0
        for e in chosen:
            gate, up = np.split(moe.up.data[e] @ token, 2)
            expected = expected + scores[e] / scores[chosen].sum() * (
                moe.down.data[e] @ (gate / (1 + np.exp(-gate)) * up))
        np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_a_residual_is_added_and_no_token_is_dropped():
    moe, x = layer(), np.random.default_rng(1).standard_normal((3, 7, 8))
    np.testing.assert_allclose(moe(x, residual=x).data, moe(x).data + x, rtol=1e-12)
    assert moe.routing.counts.sum() == 2 * 21


def test_quantized_experts_take_the_place_of_the_floats():
    moe = layer(dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((9, 8)).astype(np.float32)
    before = moe(x).data
    spec = nf.quant.QuantSpec(bits=8, group_size=None)
    weights = {f"{part}.{e}": nf.quant.quantize(w, spec) for part in ("up", "down")
               for e, w in enumerate(getattr(moe, part).data)}
    moe.set_quantized(weights)
    np.testing.assert_allclose(moe.as_arrays()(x), before, atol=0.05 * np.abs(before).max())
    other = layer(dtype=np.float32, rng=np.random.default_rng(5))
    other.set_quantized({name: nf.quant.quantize(np.ones(w.shape, np.float32), spec) for name, w in weights.items()})
    other.load_state_dict(moe.state_dict())
    np.testing.assert_array_equal(other.as_arrays()(x), moe.as_arrays()(x))
    with pytest.raises(ValueError, match=r"up has 4 experts, got weights for \[0\]"):
        moe.set_quantized({"up.0": weights["up.0"]})


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="top_k must be 1 to n_expert, got 5 and 4"):
        layer(top_k=5)
    with pytest.raises(ValueError, match="MoE: top_k must be 1 or more, got 0"):
        layer(top_k=0)
