import numpy as np
import pytest

from numformer import rlhf
from tests.rlhf.small import EOS, gpt, liked, ppo, prompts


def test_the_best_of_each_prompts_samples_is_kept():
    rows = prompts(5)
    model, seen = gpt(), []

    def reward(p, c):
        seen.extend(zip(map(tuple, p), map(tuple, c)))
        return liked(p, c)

    best, scores = rlhf.best_of_n(model, rows, 6, reward, rng=np.random.default_rng(0), max_new_tokens=8, eos_id=EOS)
    assert scores.shape == (5, 6) and [p for p, _ in seen] == [tuple(p) for p in rows for _ in range(6)]
    np.testing.assert_array_equal(liked(rows, best), scores.max(1))
    for i, completion in enumerate(best):
        assert seen[6 * i + scores[i].argmax()] == (tuple(rows[i]), tuple(completion))
    again, _ = rlhf.best_of_n(model, rows, 6, liked, rng=np.random.default_rng(0), max_new_tokens=8, eos_id=EOS)
    assert again == best and scores.max(1).mean() > scores.mean()


def test_greedy_samples_are_all_the_same_in_any_batch():
    rows = prompts(3)
    results = [rlhf.best_of_n(gpt(), rows, 2, liked, rng=None, max_new_tokens=4, temperature=0, batch=batch)[0]
               for batch in (1, 4, 64)]
    assert results[0] == results[1] == results[2]
    assert results[0] == rlhf.best_of_n(gpt(), iter(rows), 2, liked, rng=None, max_new_tokens=4, temperature=0)[0]


def test_the_kl_of_best_of_n():
    assert rlhf.best_of_n_kl(1) == 0 and rlhf.best_of_n_kl(4) == pytest.approx(np.log(4) - 0.75)


def test_bad_input_is_named():
    for options, message in (({"n": 0}, "n must be 1 or more, got 0"),
                             ({"reward_fn": lambda p, c: [1.0]}, r"must give 4 scores, got an array of shape \(1,\)"),
                             ({"reward_fn": lambda p, c: [0, np.inf, 0, 0]}, "score 1 that reward_fn gave is inf")):
        call = {"n": 2, "reward_fn": liked} | options
        with pytest.raises(ValueError, match=f"best_of_n: .*{message}"):
            rlhf.best_of_n(gpt(), prompts(2), call["n"], call["reward_fn"], rng=np.random.default_rng(0),
                           max_new_tokens=2)


@pytest.mark.parametrize("rows", [[[1.5, 2]], ["12"], [["1"]], [3]])
def test_prompts_that_are_no_token_ids_are_refused(rows):
    with pytest.raises(TypeError, match="best_of_n: prompts must be lists of integers, the ids of tokens, got"):
        rlhf.best_of_n(gpt(), rows, 2, liked, rng=None, max_new_tokens=4, temperature=0)


def test_a_reward_model_itself_is_no_function_of_prompts_and_completions():
    model = rlhf.RewardModel.from_gpt(gpt(), rng=np.random.default_rng(0))
    for call in (lambda r: rlhf.best_of_n(gpt(), prompts(2), 2, r, rng=np.random.default_rng(0), max_new_tokens=2),
                 lambda r: ppo(reward_fn=r).rollout()):
        with pytest.raises(TypeError, match=r"reward_fn must be a function .* as reward_model\.reward is, got RewardM"):
            call(model)
        call(model.reward)


def test_a_number_of_samples_or_examples_that_is_none_is_named():
    for n in (2.0, "2"):
        with pytest.raises(TypeError, match="best_of_n: n must be an integer, got"):
            rlhf.best_of_n(gpt(), prompts(2), n, liked, rng=None, max_new_tokens=4, temperature=0)
    with pytest.raises(ValueError, match="best_of_n_kl: n must be 1 or more, got 0"):
        rlhf.best_of_n_kl(0)
    with pytest.raises(TypeError, match="CompletionBatches: batch must be an integer, got '4'"):
        rlhf.CompletionBatches([([1], [2])], "4")
