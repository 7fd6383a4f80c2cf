import json
import os
import subprocess
import sys

import numpy as np
import pytest

from numformer import data, nn, train
from numformer.models.pretrained import write_safetensors
from numformer.ops import arithmetic as ar
from numformer.tensor import Tensor


def leaf(*shape, rng, gradient=True):
    x = Tensor(rng.standard_normal(shape).astype(np.float32), requires_grad=True)
    x.grad = rng.standard_normal(shape).astype(np.float32) if gradient else None
    return x


def test_adamw_is_torchs_with_decay_on_two_axes_and_more():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = [leaf(7, 5, rng=rng), leaf(33, rng=rng), leaf(2, 3, 4, rng=rng), leaf(3, gradient=False, rng=rng)]
    twins = [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in params]
    ours = train.AdamW(params, 0.01, weight_decay=0.3)
    theirs = torch.optim.AdamW([{"params": [p for p in twins if p.ndim > 1], "weight_decay": 0.3},
                                {"params": [p for p in twins if p.ndim < 2], "weight_decay": 0.0}],
                               lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    for _ in range(5):
        for p, q in zip(params, twins):
            if p.grad is not None:
                p.grad = rng.standard_normal(p.shape).astype(np.float32)
                q.grad = torch.tensor(p.grad)
        ours.lr *= 0.9
        for group in theirs.param_groups:
            group["lr"] = ours.lr
        ours.step()
        theirs.step()
    for p, q in zip(params, twins):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_steps_without_a_gradient_do_not_count_for_a_parameter_as_in_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = [leaf(7, 5, rng=rng), leaf(4, 4, rng=rng), leaf(3, 2, rng=rng)]
    twins = [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in params]
    ours = train.AdamW(params, 0.01)
    theirs = torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(8):
        for i, (p, q) in enumerate(zip(params, twins)):
            some = i == 0 or (step > 2 and (i == 1 or step % 2))
            p.grad = rng.standard_normal(p.shape).astype(np.float32) if some else None
            q.grad = None if p.grad is None else torch.tensor(p.grad)
        if step == 5:
            ours, before = train.AdamW(params, 0.01), ours
            ours.load_state_dict({name: x.copy() for name, x in before.state_dict().items()})
        ours.step()
        theirs.step()
    assert ours.steps == 8 and ours.counts.tolist() == [8, 5, 3]
    for p, q in zip(params, twins):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_a_state_of_before_each_parameter_had_a_count_is_taken():
    params = [leaf(3, rng=np.random.default_rng(0)), leaf(4, rng=np.random.default_rng(1))]
    optimizer = train.AdamW(params, 0.1)
    optimizer.step()
    state = {name: x.copy() for name, x in optimizer.state_dict().items() if name != "counts"}
    again = train.AdamW(params, 0.1)
    again.load_state_dict(state)
    assert again.steps == 1 and again.counts.tolist() == [1, 1]


def test_a_clipped_step_is_clipping_and_then_a_step():
    def run(clip_first, max_norm):
        rng = np.random.default_rng(0)
        params = [leaf(7, 5, rng=rng), leaf(33, rng=rng)]
        optimizer = train.AdamW(params, 0.01)
        norm = train.clip_grad_norm(params, max_norm) if clip_first else None
        norm = optimizer.step(None if clip_first else max_norm) or norm
        return norm, [p.data for p in params]

    for max_norm in (0.5, 1e6):
        (a, x), (b, y) = run(True, max_norm), run(False, max_norm)
        assert a == b
        for p, q in zip(x, y):
            np.testing.assert_allclose(p, q, rtol=1e-6)


def test_a_parameter_without_an_axis_is_clipped_and_then_updated():
    scale = Tensor(np.array(2, np.float32), requires_grad=True)
    optimizer = train.AdamW(scale, 0.1)
    (scale * 100.0).backward()
    assert train.clip_grad_norm(scale, 1.0) == 100 and scale.grad == pytest.approx(1)
    optimizer.step()
    assert scale.data == pytest.approx(1.9)


def test_clip_returns_the_norm_before_and_leaves_small_gradients_alone():
    rng = np.random.default_rng(0)
    params = [leaf(40, rng=rng), leaf(3, 3, rng=rng), leaf(2, gradient=False, rng=rng)]
    total = np.sqrt(sum((p.grad.astype(np.float64)**2).sum() for p in params[:2]))
    before = [p.grad.copy() for p in params[:2]]
    assert train.clip_grad_norm(params, 100.0) == pytest.approx(total, rel=1e-6)
    for p, g in zip(params, before):
        np.testing.assert_array_equal(p.grad, g)
    assert train.clip_grad_norm(params, 0.1) == pytest.approx(total, rel=1e-6)
    assert train.clip_grad_norm(params, 0.1) == pytest.approx(0.1, rel=1e-4)


def test_one_parameter_is_taken_as_a_list_of_one_and_what_an_op_made_is_refused():
    p = Tensor(np.ones((3, 2)), requires_grad=True)
    p.grad = np.full((3, 2), 6**-0.5)
    assert train.clip_grad_norm(p, 0.5) == pytest.approx(1) and np.linalg.norm(p.grad) == pytest.approx(0.5)
    optimizer = train.AdamW(p, 0.1)
    optimizer.step()
    assert optimizer.params == [p] and (p.data < 1).all()
    for made in (p * 2.0, p[0], p.detach()):
        with pytest.raises(ValueError, match=r"AdamW: a Tensor of shape .* was computed by an op"):
            train.AdamW([made], 0.1)


def test_parameters_that_no_step_could_change_are_refused_before_it():
    with pytest.raises(TypeError, match="AdamW: parameters must be float32 or float64, got float16"):
        train.AdamW(Tensor(np.ones(3, np.float16), requires_grad=True), 0.1)
    frozen = np.ones(3)
    frozen.flags.writeable = False
    for array in (frozen, np.ones((3, 2)).T):
        with pytest.raises(ValueError, match=r"AdamW: a parameter of shape .* must be writeable and C-contiguous"):
            train.AdamW(Tensor(array, requires_grad=True), 0.1)
    moving = leaf(3, rng=np.random.default_rng(0))
    train.AdamW([moving, Tensor(frozen), Tensor(np.arange(3))], 0.1).step()     # those never move


def test_zero_grad_drops_the_gradients():
    x = leaf(3, rng=np.random.default_rng(0))
    train.AdamW([x], 0.1).zero_grad()
    assert x.grad is None


def test_bad_arguments_of_adamw_are_named():
    x = leaf(3, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="no parameters"):
        train.AdamW([], 0.1)
    with pytest.raises(TypeError, match=r"params must be Tensors, got tuple; give model.parameters\(\)"):
        train.AdamW([("x", x)], 0.1)
    with pytest.raises(ValueError, match="a parameter is given twice"):
        train.AdamW([x, leaf(3, rng=np.random.default_rng(1)), x], 0.1)
    for betas in ((1.0, 0.9), (0.9, -0.1), (0.9,)):
        with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), got"):
            train.AdamW([x], 0.1, betas=betas)
    for betas in (0.9, None, "ab"):
        with pytest.raises(ValueError, match=r"AdamW: betas must be two numbers in \[0, 1\), got"):
            train.AdamW([x], 0.1, betas=betas)
    with pytest.raises(TypeError, match="AdamW: each of betas must be a real number, got 'a'"):
        train.AdamW([x], 0.1, betas=(0.9, "a"))
    for call, name in ((train.AdamW, "AdamW"), (train.clip_grad_norm, "clip_grad_norm")):
        for params in (5, np.ones(3), [np.ones(3)], Toy()):
            with pytest.raises(TypeError, match=rf"{name}: params must be Tensors, got .*; give model.parameters\(\)"):
                call(params, 0.1)
    for name in ("lr", "eps", "weight_decay"):
        with pytest.raises(ValueError, match=f"AdamW: {name} must be 0 or more, got -0.1"):
            train.AdamW([x], **{"lr": 0.1, name: -0.1})
        with pytest.raises(TypeError, match=f"AdamW: {name} must be a real number, got None"):
            train.AdamW([x], **{"lr": 0.1, name: None})
    with pytest.raises(ValueError, match="other parameters"):
        train.AdamW([x], 0.1).load_state_dict(train.AdamW([leaf(4, rng=np.random.default_rng(0))], 0.1).state_dict())


@pytest.mark.parametrize(("max_norm", "error"), [(-1, ValueError), (np.nan, ValueError), ("1", TypeError)])
def test_a_norm_that_would_turn_gradients_round_is_refused(max_norm, error):
    x = leaf(3, rng=np.random.default_rng(0))
    before = x.data.copy(), x.grad.copy()
    optimizer = train.AdamW(x, 0.1)
    for name, call in (("AdamW", optimizer.step), ("clip_grad_norm", lambda n: train.clip_grad_norm(x, n)),
                       ("Trainer", lambda n: train.Trainer(Toy(), iter([]), optimizer, 5, max_norm=n))):
        with pytest.raises(error, match=f"{name}: max_norm must be"):
            call(max_norm)
    assert (x.data == before[0]).all() and (x.grad == before[1]).all() and optimizer.steps == 0


@pytest.mark.parametrize(("lr", "error"), [(-1, ValueError), (np.nan, ValueError), ("1", TypeError), (None, TypeError)])
def test_a_rate_set_between_steps_that_is_none_changes_nothing(lr, error):
    x = leaf(3, rng=np.random.default_rng(0))
    optimizer, before = train.AdamW(x, 0.1), x.data.copy()
    optimizer.lr = lr
    with pytest.raises(error, match="AdamW: lr must be"):
        optimizer.step()
    assert (x.data == before).all() and optimizer.steps == optimizer.counts[0] == 0


@pytest.mark.parametrize(("gradient", "error", "match"), [
    (np.ones(3, np.float64), ValueError, r"must be float32 of shape \(3,\)"),
    (np.ones(4, np.float32), ValueError, r"must be float32 of shape \(3,\)"),
    (0.5, TypeError, "must be an array, got float"),
    (np.float32(0.5), TypeError, "must be an array, got float32"),
    ([1.0, 2.0, 3.0], TypeError, "must be an array, got list"),
    (Tensor(np.ones(3, np.float32)), TypeError, "must be an array, got Tensor"),
])
def test_a_step_of_a_gradient_that_does_not_fit_changes_nothing(gradient, error, match):
    rng = np.random.default_rng(0)
    params = [leaf(2, rng=rng), leaf(3, rng=rng)]
    optimizer, before = train.AdamW(params, 0.1), params[0].data.copy()
    params[1].grad = gradient
    with pytest.raises(error, match=f"AdamW: the gradient of parameter 1 {match}"):
        optimizer.step()
    assert (params[0].data == before).all() and optimizer.steps == 0 and not optimizer.counts.any()


@pytest.mark.parametrize(("data", "match"), [
    (np.ones((2, 3), np.float32).T, r"a parameter of shape \(3, 2\) must be writeable and C-contiguous"),
    (np.frombuffer(bytes(24), np.float32).reshape(3, 2), r"a parameter of shape \(3, 2\) must be writeable"),
    (np.ones((3, 2)), r"parameter 1 was float32 of shape \(3, 2\), and is float64 \(3, 2\) now; make a new AdamW"),
    (np.ones((2, 2), np.float32), r"parameter 1 was float32 of shape \(3, 2\), and is float32 \(2, 2\) now"),
])
def test_a_step_of_data_that_were_exchanged_for_what_does_not_fit_changes_nothing(data, match):
    rng = np.random.default_rng(0)
    params = [leaf(2, rng=rng), leaf(3, 2, rng=rng)]
    optimizer, before = train.AdamW(params, 0.1), params[0].data.copy()
    params[1].data, params[1].grad = data, np.ones(data.shape, data.dtype)
    with pytest.raises(ValueError, match=f"AdamW: {match}"):
        optimizer.step()
    assert (params[0].data == before).all() and optimizer.steps == 0 and not optimizer.counts.any()


def test_schedules_by_their_definitions():
    ours = [train.warmup_cosine(i, lr=1.0, warmup=4, total=12, min_lr=0.1) for i in (0, 3, 4, 8, 12, 99)]
    np.testing.assert_allclose(ours, [0.2, 0.8, 1.0, 0.55, 0.1, 0.1])
    hf = [train.hf_warmup_cosine(i, lr=1.0, warmup=4, total=12) for i in (0, 2, 4, 8, 12)]
    np.testing.assert_allclose(hf, [0, 0.5, 1.0, 0.5, 0], atol=1e-12)
    assert train.hf_warmup_cosine(20, lr=1.0, warmup=4, total=12) == 0      # does not rise again


class Toy(nn.Module):
    """A softmax regression with noise on its input."""

    def __init__(self):
        self.rng = np.random.default_rng(5)
        self.weight = nn.init.xavier_uniform(self.rng, 16, 16)
        self.bias = nn.init.constant(0, 16)

    def loss(self, tokens, targets):
        noise = self.rng.standard_normal((tokens.size, 16)).astype(np.float32)
        x = self.weight[tokens.reshape(-1)] + self.bias + noise * 0.1
        x = x - ar.log(ar.sum(ar.exp(x), axis=-1, keepdims=True))
        return -x.take_along_axis(targets.reshape(-1, 1), -1).mean()


def trainer(folder, steps=12, **options):
    if not (folder / "data").exists():
        data.write_shard(folder / "data" / "0.npy", np.random.default_rng(0).integers(0, 16, 500))
    model, batches = Toy(), data.Batches(folder / "data", 4, 8, seed=2)
    return train.Trainer(model, batches, train.AdamW(model.parameters(), 0.01), steps,
                         schedule=lambda i: train.warmup_cosine(i, lr=0.05, warmup=3, total=steps), every=3, **options)


def test_a_loop_learns_and_reports(tmp_path):
    seen = []
    loop = trainer(tmp_path, 30, callbacks=[lambda step, metrics: seen.append((step, metrics))])
    last = loop.run()
    assert [step for step, _ in seen] == list(range(30)) and seen[-1][1] is last
    assert set(last) == {"loss", "lr", "grad_norm", "tokens", "seconds"} and last["tokens"] == 32
    assert last["loss"] < seen[0][1]["loss"]


def test_batches_that_end_before_the_steps_are_named(tmp_path):
    loop = trainer(tmp_path)
    loop.batches = iter([next(loop.batches) for _ in range(3)])
    with pytest.raises(ValueError, match="the batches ended in step 3, counted from 0, of 12"):
        loop.run()
    assert loop.done == 3


def test_accumulated_batches_are_averaged(tmp_path):
    one, two = trainer(tmp_path), trainer(tmp_path, accumulate=2)
    Quiet = type("Quiet", (), {"standard_normal": lambda self, shape: np.zeros(shape)})
    one.model.rng, two.model.rng = Quiet(), Quiet()
    one.batches.batch = 8
    one.step(0)
    two.step(0)
    for p, q in zip(one.model.parameters(), two.model.parameters()):
        np.testing.assert_allclose(p.data, q.data, rtol=1e-5, atol=1e-6)


_RUN = """
import os, sys
from pathlib import Path
from tests.train.test_train import trainer
from numformer import files
folder, die_at, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
fsync, saves = os.fsync, [0]
def kill(fd):
    saves[0] += 1
    if how == "write" and saves[0] == die_at:
        os.kill(os.getpid(), 9)
    fsync(fd)
files.os.fsync = kill
loop = trainer(folder, checkpoint=folder / "run.safetensors", callbacks=[
    lambda step, _: os.kill(os.getpid(), 9) if how == "step" and step == die_at else None])
loop.run()
"""


def run_and_kill(folder, die_at, how):
    code = subprocess.run([sys.executable, "-c", _RUN, str(folder), str(die_at), how], timeout=120,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}).returncode
    assert code in (0, -9)
    return code


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    pytest.importorskip("safetensors")
    straight = trainer(tmp_path, checkpoint=tmp_path / "straight.safetensors")
    straight.run()
    # killed before any checkpoint, between two, while writing the first of the second run, and at the very end
    for die_at, how in [(1, "step"), (4, "step"), (1, "write"), (11, "step")]:
        assert run_and_kill(tmp_path, die_at, how) == -9
    assert run_and_kill(tmp_path, 99, "step") == 0
    again = trainer(tmp_path, checkpoint=tmp_path / "run.safetensors")
    again.resume()
    assert again.done == straight.done == 12
    for a, b in zip((straight.model, straight.optimizer), (again.model, again.optimizer)):
        for name, array in a.state_dict().items():
            np.testing.assert_array_equal(array, b.state_dict()[name])
    assert again.model.rng.bit_generator.state == straight.model.rng.bit_generator.state
    assert json.dumps(again.batches.state()) == json.dumps(straight.batches.state())


def test_a_run_that_was_interrupted_goes_on_in_the_same_process_with_the_same_bits(tmp_path):
    pytest.importorskip("safetensors")
    straight = trainer(tmp_path, checkpoint=tmp_path / "straight.safetensors")
    straight.run()
    loop = trainer(tmp_path, checkpoint=tmp_path / "run.safetensors")
    update, calls = loop.optimizer.step, iter(range(100))

    def interrupted(max_norm):
        if next(calls) == 4:            # the gradients are there, the update is not
            raise KeyboardInterrupt
        return update(max_norm)

    loop.optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    loop.run()
    for name, array in straight.model.state_dict().items():
        np.testing.assert_array_equal(array, loop.model.state_dict()[name])


def test_a_step_whose_callback_was_interrupted_is_not_done_again(tmp_path):
    seen = []

    def interrupted(step, _):
        seen.append(step)
        if seen == [0, 1]:
            raise KeyboardInterrupt

    loop = trainer(tmp_path, 4, callbacks=[interrupted])
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    loop.run()
    assert seen == [0, 1, 2, 3] and loop.optimizer.steps == 4


def test_every_step_is_in_training_mode_whatever_a_callback_left(tmp_path):
    loop, modes = trainer(tmp_path, 3), []
    loss, loop.callbacks = loop.model.loss, [lambda step, _: loop.model.eval()]
    loop.model.loss = lambda *batch: modes.append(loop.model.training) or loss(*batch)
    loop.run()
    assert modes == [True] * 3


def test_what_a_checkpoint_needs_is_said_before_the_first_step(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    loop = trainer(tmp_path)
    with pytest.raises(TypeError, match=r"batches must have state\(\) and restore\(state\).*, got generator"):
        train.Trainer(loop.model, (batch for batch in loop.batches), loop.optimizer, 9, checkpoint=tmp_path / "run")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"numformer\[models\]"):
        trainer(tmp_path, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("generator", [np.random.Philox, np.random.MT19937, np.random.SFC64, np.random.PCG64DXSM])
def test_any_generator_and_numbers_of_numpy_go_into_a_checkpoint(tmp_path, generator):
    pytest.importorskip("safetensors")

    def run(steps, **options):
        loop = trainer(tmp_path, **options)
        loop.steps, loop.batches.seed = steps, np.int64(2)
        loop.model.rng = np.random.Generator(generator(5))
        loop.generators = [loop.model.rng]
        loop.run()
        return loop.model

    straight = run(12)
    run(6, checkpoint=tmp_path / "run.safetensors")
    again = run(12, checkpoint=tmp_path / "run.safetensors")
    np.testing.assert_array_equal(again.weight.data, straight.weight.data)
    assert again.rng.random() == straight.rng.random()


def test_a_rate_that_a_callback_lowered_goes_into_a_checkpoint(tmp_path):
    pytest.importorskip("safetensors")

    def run(steps, **options):
        loop = trainer(tmp_path, steps, **options)
        loop.schedule = None
        loop.callbacks = [lambda step, _: setattr(loop.optimizer, "lr", np.float64(0.01 / (step + 2)))]
        return loop.run()["lr"], loop.model.weight.data

    rate, straight = run(9)
    run(5, checkpoint=tmp_path / "run.safetensors")
    again, weight = run(9, checkpoint=tmp_path / "run.safetensors")
    np.testing.assert_array_equal(weight, straight)
    assert again == rate


@pytest.mark.parametrize("hold", [lambda rng: [rng], lambda rng: {"noise": (rng,)}])
def test_generators_in_lists_and_dicts_go_into_a_checkpoint(tmp_path, hold):
    pytest.importorskip("safetensors")

    def run(steps, **options):
        loop = trainer(tmp_path, **options)
        model = loop.model
        noise, model.rngs = model.rng, hold(model.rng)
        model.rng = type("Drawn", (), {"standard_normal": noise.standard_normal})()     # no generator
        again = train.Trainer(model, loop.batches, loop.optimizer, steps, every=3, **options)
        again.run()
        return model.weight.data

    straight = run(12)
    run(6, checkpoint=tmp_path / "run.safetensors")
    np.testing.assert_array_equal(run(12, checkpoint=tmp_path / "run.safetensors"), straight)


@pytest.mark.parametrize("options", [{"accumulate": 0}, {"every": 0}])
def test_a_loop_of_no_batches_is_refused(options):
    with pytest.raises(ValueError, match=r"Trainer: (accumulate|every) must be 1 or more, got 0"):
        train.Trainer(Toy(), iter([]), None, 5, **options)


def test_what_is_no_iterator_or_no_number_of_steps_is_refused():
    with pytest.raises(TypeError, match=r"Trainer: batches must be an iterator, .* or iter\(list\), got list"):
        train.Trainer(Toy(), [], None, 5)
    with pytest.raises(TypeError, match=r"Trainer: steps must be an integer, got 2\.5"):
        train.Trainer(Toy(), iter([]), None, 2.5)
    with pytest.raises(ValueError, match="Trainer: steps must be 0 or more, got -1"):
        train.Trainer(Toy(), iter([]), None, -1)


def test_what_is_no_list_of_callbacks_is_refused():
    for wrong in (print, [print, "print"], 5):
        with pytest.raises(TypeError, match=r"Trainer: callbacks must be a list of functions .*, got .*"):
            train.Trainer(Toy(), iter([]), None, 5, callbacks=wrong)


def test_an_optimizer_of_another_model_is_refused():
    model, other = Toy(), Toy()
    with pytest.raises(ValueError, match="Trainer: optimizer has none of the model's parameters"):
        train.Trainer(model, iter([]), train.AdamW(other.parameters(), 0.1), 5)
    train.Trainer(model, iter([]), train.AdamW(model.parameters()[:1], 0.1), 5)
    train.Trainer(model, iter([]), type("Own", (), {})(), 5)


def test_a_broken_or_foreign_checkpoint_is_one_clear_line(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"
    trainer(tmp_path, 3, checkpoint=path).run()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        trainer(tmp_path, checkpoint=path).run()
    write_safetensors(path, {"state": np.frombuffer(b"[1]", np.uint8)})
    with pytest.raises(ValueError, match="not a checkpoint of this run"):
        trainer(tmp_path, checkpoint=path).run()
    path.write_bytes(whole)
    other = trainer(tmp_path, checkpoint=path)
    other.batches = data.Batches(tmp_path / "data", 4, 8, seed=3)
    with pytest.raises(ValueError, match="not a checkpoint of this run"):
        other.run()


@pytest.mark.parametrize("other", ["model", "optimizer", "generators", "data"])
def test_a_foreign_checkpoint_changes_nothing(tmp_path, other):
    pytest.importorskip("safetensors")
    path = tmp_path / "run.safetensors"
    trainer(tmp_path, 3, checkpoint=path).run()
    loop = trainer(tmp_path, checkpoint=path)
    if other == "model":
        loop.model.more = nn.init.constant(0, 3)
    elif other == "optimizer":
        loop.optimizer = train.AdamW(loop.model.parameters()[:1], 0.01)
    elif other == "generators":
        loop.generators.append(np.random.default_rng(6))
    else:
        loop.batches.seed = 3

    def state():
        return json.dumps([loop.batches.state(), [g.bit_generator.state for g in loop.generators], loop.done]), [
            array.tolist() for part in (loop.model, loop.optimizer) for array in part.state_dict().values()]

    before = state()
    with pytest.raises(ValueError, match="not a checkpoint of this run"):
        loop.resume()
    assert state() == before
