import numpy as np
import pytest

import numformer as nf


class Twice(nf.nn.Module):
    """Two layers of experts, the second of which may rest; two outputs."""

    def __init__(self, rng):
        self.first, self.second = (nf.nn.MoE(8, 6, 4, rng=rng) for _ in range(2))

    def __call__(self, x, both):
        y = self.first(x)
        return (self.second(y) if both else y), y


def run(checkpointed, both):
    module = Twice(np.random.default_rng(0))
    x = nf.Tensor(np.random.default_rng(1).standard_normal((10, 8), np.float32), requires_grad=True)
    if checkpointed:
        y, z = nf.nn.checkpoint(module, x, both)
    else:
        y, z = module(x, both)
    routings = [moe.routing for moe in (module.first, module.second) if moe.routing is not None]
    loss = (y * z).sum() + sum(nf.moe.load_balancing_loss(r) * (i + 1.0) for i, r in enumerate(routings))
    loss.backward()
    assert module.first.routing is routings[0]
    return len(routings), loss.item(), [x.grad] + [p.grad for p in module.parameters()]


def test_routings_of_several_experts_are_carried_out_with_their_gradients():
    for both, count in (True, 2), (False, 1):
        (number, loss, gradients), (again, same, others) = run(False, both), run(True, both)
        assert number == again == count and loss == same
        for a, b in zip(gradients, others):
            np.testing.assert_array_equal(a, b)


def test_one_tensor_comes_back_as_one_tensor():
    rng = np.random.default_rng(0)
    layer, x = nf.nn.Linear(3, 2, rng=rng), nf.Tensor(np.ones((1, 3), np.float32))
    y = nf.nn.checkpoint(layer, x)
    assert type(y) is nf.Tensor
    np.testing.assert_array_equal(y.data, layer(x).data)


@pytest.mark.parametrize("checkpoint", [nf.checkpoint, nf.nn.checkpoint])
def test_dropout_inside_drops_the_same_again_though_no_generator_is_given(checkpoint):
    class Layer(nf.nn.Module):
        def __init__(self, rng):
            self.attention = nf.nn.MultiHeadAttention(8, 2, dropout=0.3, rng=rng)
            self.drop = nf.nn.Dropout(0.3, rng=np.random.default_rng(1))

        def __call__(self, x):
            return self.drop(self.attention(self.drop(x)))

    class Two(nf.nn.Module):
        def __init__(self, rng):
            self.first, self.second = Layer(rng), Layer(rng)

        def __call__(self, x, remember):
            return remember(self.second, self.first(x))

    def run(remember):
        rng = np.random.default_rng(0)
        layer, model = Layer(rng), Two(rng)
        x = nf.Tensor(rng.standard_normal((2, 5, 8), np.float32), requires_grad=True)
        y = remember(layer, x)
        y = remember(model, remember(layer, y), remember)
        (y * y).sum().backward()
        return [y.data, x.grad, rng.random(), layer.drop.rng.random(), *(p.grad for p in model.parameters())]

    for plain, again in zip(run(lambda f, *inputs: f(*inputs)), run(checkpoint), strict=True):
        np.testing.assert_array_equal(plain, again)
