import numpy as np
import pytest

import numformer as nf
from numformer import rlhf
from tests.rlhf.small import gpt, prompts


def pairs(count=23):
    return list(zip(prompts(count, seed=1), prompts(count, seed=2)))


def rows_of(tokens, targets):
    """(prompt, completion) of each row, read back from the arrays."""
    for x, y in zip(tokens, targets):
        first = int((y != -100).argmax())
        completion = y[y != -100].tolist()
        yield x[:first + 1].tolist(), completion


def test_only_the_completion_has_targets():
    tokens, targets = rlhf.CompletionBatches.collate([(np.array([5, 6, 7]), np.array([8, 9])),
                                                      (np.array([5]), np.array([6]))])
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 8], [5, 0, 0, 0]])
    np.testing.assert_array_equal(targets, [[-100, -100, 8, 9], [6, -100, -100, -100]])


def test_pairs_are_padded_apart():
    chosen, rejected = rlhf.PairBatches.collate([([5, 6], [7]), ([5], [8, 9, 9])])
    np.testing.assert_array_equal(chosen, [[5, 6], [5, -1]])
    np.testing.assert_array_equal(rejected, [[7, -1, -1], [8, 9, 9]])


@pytest.mark.parametrize("stretch", [1, 3])
def test_an_epoch_takes_every_example_once_and_the_next_another_order(stretch):
    batches = rlhf.CompletionBatches(pairs(24), 4, seed=1, stretch=stretch)
    epochs = [[row for _ in range(6) for row in rows_of(*next(batches))] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(pairs(24)) and epochs[0] != epochs[1]


def test_sorted_batches_hold_less_padding():
    def padding(stretch):
        batches = rlhf.CompletionBatches(pairs(64), 4, stretch=stretch)
        return sum(next(batches)[0].size for _ in range(16))
    assert padding(16) < 0.85 * padding(1)


@pytest.mark.parametrize("kind", [rlhf.CompletionBatches, rlhf.PairBatches])
def test_pairs_may_come_from_anything_to_go_through(kind):
    batches = kind(zip(prompts(5), prompts(5)), 2)
    assert batches.state() == kind(list(zip(prompts(5), prompts(5))), 2).state() and len(next(batches)[0]) == 2
    assert len(kind(np.ones((3, 2, 4), int), 2).examples) == 3
    with pytest.raises(ValueError, match=f"{kind.__name__}: there are no examples"):
        kind(iter([]), 2)


@pytest.mark.parametrize("kind", [rlhf.CompletionBatches, rlhf.PairBatches])
def test_the_order_is_the_seeds_and_resumes_in_the_middle_of_an_epoch(kind):
    one, other = kind(pairs(), 4, seed=3), kind(pairs(), 4, seed=3)
    for _ in range(8):                      # a batch ends one epoch and begins the next
        next(one)
    other.restore(one.state())
    for _ in range(9):
        for a, b in zip(next(one), next(other)):
            np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(next(kind(pairs(), 4, seed=4)), next(kind(pairs(), 4, seed=3))))
    with pytest.raises(ValueError, match="the checkpoint was made with"):
        kind(pairs()[::-1], 4, seed=3).restore(one.state())
    with pytest.raises(ValueError, match="the checkpoint was made with"):
        kind(pairs(), 4, seed=5).restore(one.state())


def test_fine_tuning_with_the_trainer_learns_and_resumes(tmp_path):
    pytest.importorskip("safetensors")
    examples = [(p, [p[0], 1]) for p in prompts(32)]            # say the first token again

    def run(steps, total, path):
        model = gpt()
        loop = nf.train.Trainer(model, rlhf.CompletionBatches(examples, 8), nf.train.AdamW(model.parameters(), 3e-3),
                                steps, schedule=lambda i: nf.train.warmup_cosine(i, lr=1e-2, warmup=2, total=total),
                                checkpoint=path, every=10)
        return model, loop.run()

    straight, metrics = run(40, 40, tmp_path / "a")
    run(20, 40, tmp_path / "b")
    again, _ = run(40, 40, tmp_path / "b")
    assert metrics["loss"] < 1.5
    for name, array in straight.state_dict().items():
        np.testing.assert_array_equal(array, again.state_dict()[name])


@pytest.mark.parametrize(("examples", "batch", "message"), [
    ([], 4, "there are no examples"), ([([1], [])], 4, "example 0 must be two lists"), ([([1], [2])], 0, "batch must"),
    ([([1], [2], [3])], 1, "example 0 must be two lists")])
@pytest.mark.parametrize("kind", [rlhf.CompletionBatches, rlhf.PairBatches])
def test_bad_examples_are_named(kind, examples, batch, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*{message}"):
        kind(examples, batch)


@pytest.mark.parametrize("kind", [rlhf.CompletionBatches, rlhf.PairBatches])
def test_a_seed_that_is_none_is_named(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__}: seed must be an integer, got None"):
        kind([([1], [2])], 1, seed=None)
    with pytest.raises(ValueError, match=f"{kind.__name__}: seed must be 0 or more, got -1"):
        kind([([1], [2])], 1, seed=-1)


@pytest.mark.parametrize("part", ["12", [1.5], ["1"], np.ones(2)])
@pytest.mark.parametrize("kind", [rlhf.CompletionBatches, rlhf.PairBatches])
def test_examples_that_are_no_integers_are_named(kind, part):
    with pytest.raises(TypeError, match=f"{kind.__name__}: example 1 must be lists of integers, the ids of"):
        kind([([1], [2]), ([1], part)], 1)
