"""nn.MultiHeadAttention: dropout of its weights, in a layer and in a GPT, and slopes of one's own."""
import numpy as np
import pytest

import numformer as nf
from numformer.nn import MultiHeadAttention


def layer(dropout=0.3):
    return MultiHeadAttention(16, 4, 2, dropout=dropout, rng=np.random.default_rng(0))


def test_dropout_acts_in_training_alone():
    attention, plain = layer(), layer(0.0)
    x = np.random.default_rng(1).standard_normal((2, 9, 16), np.float32)
    assert (attention(x).data != plain(x).data).any() and (attention(x).data != attention(x).data).any()
    attention.eval()
    assert (attention(x).data == plain(x).data).all()


def test_a_checkpoint_that_knows_the_generator_drops_the_same_weights_again():
    x = np.random.default_rng(1).standard_normal((2, 9, 16), np.float32)
    gradients, after = [], []
    for checkpointed in (False, True):
        attention = layer()
        leaf = nf.Tensor(x, requires_grad=True)
        y = nf.checkpoint(attention, leaf, rng=attention.rng) if checkpointed else attention(leaf)
        (y * y).sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in attention.parameters())])
        after.append(attention.rng.random())
    for plain, again in zip(*gradients, strict=True):
        assert (plain == again).all()
    assert after[0] == after[1]


def test_a_gpt_learns_with_dropout():
    rng = np.random.default_rng(0)
    model = nf.models.GPT(nf.models.GPTConfig(16, 12, 2, 2, 32, dropout=0.1), rng=rng)
    model.train()
    tokens = np.arange(13)[None] % 4 + np.arange(4)[:, None]
    optimizer = nf.train.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.data))
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    assert (model(tokens[:, :-1]).data == model(tokens[:, :-1]).data).all()


def test_a_gate_is_one_number_for_each_head_or_for_each_head_of_each_row():
    attention = layer(0.0)
    x = np.random.default_rng(1).standard_normal((2, 9, 16), np.float32)
    attention.head_gate = one = np.array([1, 0, 2, 0.5], np.float32)
    want = attention(x).data
    for gate in (nf.Tensor(one), one[None], np.stack([one, one])):
        attention.head_gate = gate
        assert (attention(x).data == want).all()
    for gate, got in (([1, 0, 2, 0.5], "list"), (one[:3], r"\(3,\)"), (np.ones((4, 2)), r"\(4, 2\)"), (1.0, "float")):
        attention.head_gate = gate
        with pytest.raises(ValueError, match=rf"head_gate must be .* of shape \(4,\) or \(2, 4\), got {got}"):
            attention(x)


def test_alibi_takes_slopes_of_ones_own_one_for_each_head():
    x = np.random.default_rng(1).standard_normal((2, 9, 16), np.float32)
    usual, given, other = (MultiHeadAttention(16, 4, alibi=alibi, rng=np.random.default_rng(0))
                           for alibi in (True, nf.alibi_slopes(4), nf.alibi_slopes(8)[4:]))
    assert (usual(x).data == given(x).data).all() and (usual(x).data != other(x).data).any()
    with pytest.raises(ValueError, match=r"a bool or 4 slopes, got shape \(3,\)"):
        MultiHeadAttention(16, 4, alibi=np.ones(3), rng=np.random.default_rng(0))
