"""The tape: gradients, what it keeps and lets go, checkpoints, and Tensors beside NumPy."""
import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import numformer as nf
from numformer.tensor import Tensor, apply, checkpoint, no_grad
from tests.test_array_likes import WithDLPack


def multiply(a, b):
    return apply(lambda x, y: (x * y, (x, y)), lambda d, s: (d * s[1], d * s[0]), a, b)


def add(a, b):
    return apply(lambda x, y: (x + y, None), lambda d, s: (d, d), a, b)


def leaf(*values):
    return Tensor(np.array(values), requires_grad=True)


def test_arrays_in_arrays_out():
    assert type(multiply(np.ones(2), np.ones(2))) is np.ndarray


def test_a_tensor_used_twice_gets_both_gradients():
    x = leaf(2.0, 3.0)
    add(multiply(x, x), x).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, 2 * x.data + 1)


def test_gradients_accumulate_over_calls():
    x = leaf(2.0)
    multiply(x, x).backward()
    multiply(x, x).backward()
    np.testing.assert_array_equal(x.grad, 8.0)


def test_a_long_chain_needs_no_recursion():
    x = y = leaf(1.0)
    for _ in range(50_000):
        y = add(y, x)
    y.backward()
    assert x.grad == 50_001


def test_no_grad_records_nothing():
    x = leaf(1.0)
    with no_grad():
        assert not multiply(x, x).requires_grad


def test_walking_the_same_graph_twice_is_an_error():
    x = leaf(1.0)
    y = multiply(x, x)
    y.backward()
    with pytest.raises(RuntimeError, match="already walked"):
        y.backward()


def test_checkpoint_gives_the_same_gradients_to_inputs_parameters_and_outside_tensors():
    def run(remember):
        x, weight = leaf(0.5, -1.5), leaf(2.0, 3.0)
        outside = multiply(weight, weight)              # made before, read inside, and used again after
        def inside(t):
            return nf.gelu(multiply(multiply(t, outside), weight))
        y = remember(inside, x)
        add(y, outside).backward(np.array([1.0, 2.0]))
        return x.grad, weight.grad

    for plain, again in zip(run(lambda f, x: f(x)), run(checkpoint)):
        np.testing.assert_array_equal(plain, again)


def test_checkpoint_draws_the_same_random_numbers_again():
    rng = np.random.default_rng(0)
    x = leaf(*np.ones(1000))
    def drop(t):
        return multiply(t, rng.random(1000) < 0.5)
    y = checkpoint(drop, x, rng=rng)
    after = rng.bit_generator.state
    y.backward(np.ones(1000))
    np.testing.assert_array_equal(x.grad, y.data)
    assert rng.bit_generator.state == after


def test_checkpoint_draws_the_same_numbers_when_nested():
    def run(remember):
        rng = np.random.default_rng(0)
        x, weight = leaf(*np.linspace(-1, 1, 50)), leaf(*np.linspace(1, 2, 50))
        def drop(t):
            return multiply(t, rng.random(50) < 0.5)
        def inner(t):
            return drop(multiply(drop(t), weight))
        def outer(t):
            return multiply(remember(inner, drop(t), rng=rng), weight)
        y = remember(outer, x, rng=rng)
        y = multiply(y, remember(outer, y, rng=rng))
        y.backward(np.ones(50))
        return y.data, x.grad, weight.grad

    for plain, again in zip(run(lambda f, x, rng: f(x)), run(checkpoint)):
        np.testing.assert_array_equal(plain, again)


def test_checkpoint_drops_the_same_again_without_being_told_of_the_generators():
    def run(remember):
        rng, other = np.random.default_rng(0), np.random.default_rng(1)
        x = leaf(*np.linspace(-1, 1, 48))
        def attend(t):
            heads = t.reshape(1, 2, 3, 8)
            return nf.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5, rng=other)
        def inner(t):
            return nf.dropout(attend(nf.dropout(t, 0.3, rng)).reshape(48), 0.3, rng)
        def outer(t):
            return nf.dropout(remember(inner, t), 0.3, rng)
        y = remember(outer, nf.dropout(x, 0.3, rng))
        y = nf.dropout(y, 0.3, rng)
        after = rng.bit_generator.state, other.bit_generator.state
        y.backward(np.ones(48))
        assert (rng.bit_generator.state, other.bit_generator.state) == after
        return y.data, x.grad, after

    plain, again = run(lambda f, x: f(x)), run(checkpoint)
    assert plain[2] == again[2]
    np.testing.assert_array_equal(plain[0], again[0])
    np.testing.assert_allclose(plain[1], again[1], rtol=1e-12)


def test_checkpoint_of_a_function_with_several_outputs():
    def run(remember, use):
        x, weight = leaf(0.5, -1.5), leaf(2.0, 3.0)
        a, b = remember(lambda t: (multiply(t, weight), add(t, t)), x)
        use(a, b).backward(np.array([1.0, 2.0]))
        return x.grad, weight.grad

    for use in (multiply, lambda a, b: a):
        for plain, again in zip(run(lambda f, x: f(x), use), run(checkpoint, use)):
            np.testing.assert_array_equal(plain, again)


def test_checkpoint_reads_parameters_though_its_inputs_need_no_gradient():
    weight = leaf(2.0, 3.0)
    checkpoint(lambda t: multiply(t, weight), Tensor(np.array([5.0, 7.0]))).backward(np.ones(2))
    np.testing.assert_array_equal(weight.grad, [5.0, 7.0])


def test_what_a_checkpointed_function_makes_and_does_not_return_is_refused_outside_of_it():
    x, weight, kept = leaf(0.5, -1.5), leaf(2.0, 3.0), []

    def function(t):
        kept[:] = multiply(t, weight), multiply(weight, weight), nf.linear(t.reshape(1, 2), weight.reshape(1, 2))
        return add(kept[0], kept[1])

    def outer(t):
        kept.append(checkpoint(function, t))
        return add(kept[-1], t)

    y = checkpoint(function, x)
    lost = list(kept)
    checkpoint(outer, x)
    assert len(kept) == 4
    for t in lost + kept:
        assert not t.requires_grad
        with pytest.raises(RuntimeError, match="multiply: a tensor that was made inside a checkpointed function"):
            nf.ops.arithmetic.multiply(t, 2.0)
        with pytest.raises(RuntimeError, match=r"checkpoint: .* return it from the function"):
            checkpoint(lambda s: add(s, s), t)
        with pytest.raises(RuntimeError, match=r"backward: .* return it from the function"):
            t.backward(np.ones(t.shape))
        with no_grad():
            assert multiply(t, t).shape == t.shape
        assert multiply(t.detach(), x if t.ndim == 1 else 2.0).shape == t.shape
    y.backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, weight.data)


def test_what_a_checkpointed_function_makes_under_no_grad_is_a_constant():
    x, kept = leaf(0.5, -1.5), []

    def function(t):
        with no_grad():
            kept[:] = [multiply(t, t)]
        return multiply(t, t)

    checkpoint(function, x)
    assert multiply(kept[0], x).requires_grad
    with no_grad():
        kept[:] = [checkpoint(lambda t: kept.append(multiply(t, t)) or t, x), *kept]
    assert all(multiply(t, x).requires_grad for t in kept)


def test_a_gradient_delivered_to_two_tensors_is_never_written_to():
    a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
    s = add(a, b)                                   # hands one array to both
    add(add(s, a), add(a, multiply(b, b))).backward(np.ones(2))
    np.testing.assert_array_equal(a.grad, [3.0, 3.0])
    np.testing.assert_array_equal(b.grad, 1 + 2 * b.data)
    assert not np.shares_memory(a.grad, b.grad)


def test_the_gradient_given_to_backward_is_not_kept():
    x, g = leaf(1.0, 2.0), np.ones(2)
    x.backward(g)
    x.backward(g)
    np.testing.assert_array_equal(g, 1)
    np.testing.assert_array_equal(x.grad, 2)
    a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
    add(a, add(b, b)).backward(g)
    x.reshape(2, 1).reshape(2).backward(g)
    np.testing.assert_array_equal(g, 1)
    assert not any(np.shares_memory(t.grad, g) for t in (a, b, x))


def test_leaves_do_not_share_the_gradient_that_one_call_gave_to_both():
    a, b, weight, g = leaf(1.0, 2.0), leaf(3.0, 4.0), leaf(1.0, 1.0), np.ones(2)
    nf.add_rms_norm(a, b, weight)[0].backward(g)        # one array for both terms of a sum
    assert not np.shares_memory(a.grad, b.grad)
    a.grad = b.grad = None
    nf.add_layer_norm(a, b, weight)[1].backward(g)      # the gradient of the second of two outputs, passed on
    checkpoint(lambda t: weight, a).backward(g)
    assert not any(np.shares_memory(x, y) for x, y in [(a.grad, b.grad), (a.grad, g), (b.grad, g), (weight.grad, g)])


def test_a_walk_that_failed_leaves_nothing_behind_for_the_next():
    def fail(dy, saved):
        raise ZeroDivisionError

    x = leaf(1.0, 2.0)
    y = multiply(x, 2.0)
    bad = apply(lambda a: (a.copy(), None), fail, y)
    loss, other = add(multiply(y, 1.0), bad), multiply(y, 3.0)      # y is reached before the failure
    with pytest.raises(ZeroDivisionError):
        loss.backward(np.ones(2))
    other.backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, 6.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="already walked"):
            other.backward(np.ones(2))


@pytest.mark.parametrize("result", [lambda t: t.data, lambda t: (t, t.data), lambda t: None])
def test_a_checkpointed_function_must_return_tensors(result):
    with pytest.raises(TypeError, match="must return a Tensor or a tuple of Tensors, got "):
        checkpoint(result, leaf(1.0, 2.0))


def test_a_gradient_of_a_wrong_shape_is_an_error():
    x = leaf(1.0, 2.0)
    with pytest.raises(ValueError, match="shape"):
        apply(lambda a: (a, None), lambda d, s: (d[:1],), x).backward(np.ones(2))
    with pytest.raises(ValueError, match=r"must have shape \(2,\)"):
        x.backward(np.ones(3))


@pytest.mark.parametrize("given", [
    WithDLPack(np.arange(3.0)), np.frombuffer(b"\0" + np.arange(3.0).tobytes(), np.uint8)[1:].view(np.float64),
    np.arange(3.0, dtype=">f8"), np.arange(3), [0, 1, 2], Tensor(np.arange(3.0)), np.arange(3.0)[::-1].copy()[::-1]])
def test_backward_takes_a_gradient_of_any_layout(given):
    x = leaf(1.0, 2.0, 3.0)
    nf.softmax(x).backward(given)
    again = leaf(1.0, 2.0, 3.0)
    nf.softmax(again).backward(np.arange(3.0))
    np.testing.assert_array_equal(x.grad, again.grad)


@pytest.mark.parametrize("given", [np.ones(3) * 1j, ["1", "2", "3"], {}, object()])
def test_backward_refuses_a_gradient_that_is_no_array_of_real_numbers(given):
    with pytest.raises(TypeError, match=r"backward: gradient must be (of real|an array of) numbers, got"):
        nf.softmax(leaf(1.0, 2.0, 3.0)).backward(given)


def test_only_floats_have_gradients():
    with pytest.raises(TypeError, match="int64"):
        Tensor(np.arange(3), requires_grad=True)


def test_an_op_that_forgets_the_gradient_of_an_input_is_an_error():
    x, y = leaf(1.0), leaf(2.0)

    def scaled_forward(a, b):
        return a * b, b

    def scaled_backward(dy, b):
        return (dy * b,)

    with pytest.raises(ValueError, match="backward: scaled_backward gave 1 gradients for 2 inputs; give None"):
        apply(scaled_forward, scaled_backward, x, y).sum().backward()
    apply(scaled_forward, lambda dy, b: (g for g in (dy * b, None)), x, y).sum().backward()
    assert x.grad == 2 and y.grad is None


def test_no_grad_nests_and_decorates():
    x, block = leaf(1.0), no_grad()
    with block:
        with block:
            pass
        assert not multiply(x, x).requires_grad
    assert multiply(x, x).requires_grad
    assert not no_grad()(lambda: multiply(x, x))().requires_grad


def test_no_grad_decorates_generators_step_by_step():
    x = Tensor(np.ones(3), requires_grad=True)

    @no_grad()
    def doubled(count):
        """Doc."""
        for _ in range(count):
            yield (x * 2.0).requires_grad
        return "end"

    def both():
        recorded.append((yield from doubled(2)))

    recorded, seen = [], []
    for inside in both():
        seen.append((inside, (x * 2.0).requires_grad))
    assert seen == [(False, True)] * 2 and recorded == ["end"] and doubled.__doc__ == "Doc."


def test_a_tensor_is_described_as_an_array_is():
    x = Tensor(np.zeros((2, 3), np.float32))
    assert (x.shape, x.dtype, x.ndim, x.size, len(x)) == ((2, 3), np.float32, 2, 6, 2)
    assert Tensor(np.array([2.5])).item() == 2.5 and float(Tensor(np.array(2.5))) == 2.5
    loss = Tensor(np.array(0.125, np.float32), requires_grad=True)
    assert f"{loss:.2f}" == "0.12" and f"{loss}" == str(loss)
    assert np.asarray(x) is x.data and not leaf(1.0).detach().requires_grad
    with pytest.raises(TypeError, match="detach"):
        np.asarray(leaf(1.0))


def test_the_gradient_of_a_scaled_scalar_reaches_backward_as_an_array():
    def check(dy, saved):
        assert type(dy) is np.ndarray
        return (np.broadcast_to(dy, saved),)

    x = Tensor(np.ones(3), requires_grad=True)
    total = apply(lambda x: (np.asarray(x.sum()), x.shape), check, x)
    (total * 0.5 + total / 4).backward()
    np.testing.assert_array_equal(x.grad, 0.75)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_deep_copy_and_a_pickle_hold_the_values_and_not_how_they_were_made(again):
    x = leaf(*np.ones(1000))
    x.grad = np.ones(1000)
    y = nf.exp(add(x, x) * 1e-3)
    assert len(pickle.dumps(y)) < 10_000
    x_too, y_too = again((x, y))
    for tensor, twin in ((x, x_too), (y, y_too)):
        assert np.array_equal(twin.data, tensor.data) and not np.shares_memory(twin.data, tensor.data)
    assert np.array_equal(x_too.grad, x.grad) and x_too.requires_grad and not y_too.requires_grad
    multiply(x_too, y_too).backward(x.data)
    np.testing.assert_array_equal(x_too.grad, x.grad + y.data)
    deep = x
    for _ in range(2000):
        deep = add(deep, x)
    np.testing.assert_array_equal(again(deep).data, deep.data)
    assert copy.copy(y).requires_grad


def test_walks_in_several_threads_add_to_one_leaf():
    x = Tensor(np.zeros(1 << 17), requires_grad=True)

    def walk():
        for _ in range(25):
            add(x, x).backward(np.ones(x.shape))

    threads = [threading.Thread(target=walk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(x.grad, 200.0)


def test_a_fork_beside_a_walk_in_another_thread_leaves_the_child_its_own():
    code = ("import os, signal, threading, numpy as np, numformer as nf\n"
            "x, y = (nf.Tensor(np.ones(n), requires_grad=True) for n in (1 << 20, 3))\n"
            "def walk():\n"
            "    while not done: (x * 2.0).backward(x.data)\n"
            "done = False\n"
            "thread = threading.Thread(target=walk)\n"
            "thread.start()\n"
            "wrong = 0\n"
            "for _ in range(20):\n"
            "    child = os.fork()\n"
            "    if child == 0:\n"
            "        signal.alarm(30)\n"
            "        (y * 2.0).sum().backward()\n"
            "        os._exit(int((y.grad != 2).any()))\n"
            "    wrong += os.waitpid(child, 0)[1]\n"
            "done = True\n"
            "thread.join()\n"
            "print(wrong)")
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
                         timeout=120)
    assert out.stdout.strip() == "0"


@pytest.mark.parametrize("gradient", [1.0, [2.0]])
def test_a_gradient_of_an_op_that_is_no_array_is_named(gradient):
    for x in (leaf(1.0), leaf(1.0) * 1):
        y = apply(lambda a: (a * 2, None), lambda dy, saved: (gradient,), x)
        with pytest.raises(TypeError, match=f"a gradient must be an array, .* got {type(gradient).__name__}"):
            y.backward()


def test_a_subclass_which_no_op_would_know_is_refused():
    with pytest.raises(TypeError, match="Parameter: a Tensor has no subclasses, as ops and modules"):
        type("Parameter", (Tensor,), {})
