import numpy as np
import pytest

import numformer as nf
from numformer.models.sampling import sample

P = np.array([.4, .3, .15, .1, .05])


def shares(probabilities=P, draws=20000, seed=0, **options):
    """How often each token comes from these probabilities."""
    logits = np.log(np.tile(np.asarray(probabilities, np.float64), (draws, 1)))
    ids = sample(logits, rng=np.random.default_rng(seed), **options)
    assert ids.dtype == np.int64 and ids.shape == (draws,)
    return np.bincount(ids, minlength=len(probabilities)) / draws


@pytest.mark.parametrize(("options", "expected"), [
    ({}, P), ({"temperature": 0.5}, P**2 / (P**2).sum()), ({"temperature": 2.0}, P**.5 / (P**.5).sum()),
    ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]), ({"top_k": 99}, P), ({"top_p": 1.0}, P),
    ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]), ({"top_p": 0.1}, [1, 0, 0, 0, 0]),
    ({"min_p": 0.3}, P * [1, 1, 1, 0, 0] / .85), ({"min_p": 0.0}, P), ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
    # top_p counts what top_k left: 4/7 alone is more than a half
    ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0, 0]),
    # min_p looks at the probabilities after temperature: 1, .56, .14, .06 of the largest
    ({"temperature": 0.5, "min_p": 0.3}, [.64, .36, 0, 0, 0])])
def test_tokens_come_as_often_as_the_options_say(options, expected):
    np.testing.assert_allclose(shares(**options), expected, atol=0.012)


def test_the_order_of_the_vocabulary_does_not_matter():
    order = [3, 0, 4, 2, 1]
    for options in ({"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}):
        np.testing.assert_allclose(shares(P[order], **options), shares(**options)[order], atol=0.015)


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals():
    assert sample(np.array([[1., 3, 3], [2, 1, 0]]), temperature=0).tolist() == [1, 0]


def test_one_number_a_row_is_drawn_whatever_the_options():
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2}):
        rng, other = np.random.default_rng(4), np.random.default_rng(4)
        sample(np.zeros((3, 5)), rng=rng, **options)
        other.random(3)
        assert rng.bit_generator.state == other.bit_generator.state


def gpt(**options):
    shape = {"vocab_size": 30, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32} | options
    return nf.models.GPT(nf.models.GPTConfig(**shape), rng=np.random.default_rng(0))


@pytest.mark.parametrize("options", [{}, {"n_expert": 4}, {"n_kv_head": 1}, {"position": "learned"}])
def test_prompts_of_different_lengths_are_answered_as_each_alone(options):
    model, prompts = gpt(**options), [[1], [2, 3, 4, 5], [6, 7]]
    rows = model.generate(prompts, 6, temperature=0)
    for row, prompt in zip(rows, prompts):
        assert row[:len(prompt)] == prompt and len(row) == len(prompt) + 6
        for length in range(len(prompt), len(row)):
            assert row[length] == model.as_arrays()(np.array([row[:length]]))[0, -1].argmax()
    assert [model.generate(prompt, 6, temperature=0) for prompt in prompts] == rows


def test_the_generator_decides_what_is_drawn():
    model = gpt()
    a, b, c = (model.generate([[1, 2], [3]], 10, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a == b != c
    assert model.generate([1, 2], 5, top_k=1, rng=np.random.default_rng(0)) == model.generate([1, 2], 5, temperature=0)


def test_a_row_ends_with_eos_and_the_others_go_on():
    model, prompts = gpt(), [[1, 2], [3], [4, 5, 6]]
    free = model.generate(prompts, 8, temperature=0)
    eos = free[0][4]                    # an id that the first row makes
    rows = model.generate(prompts, 8, temperature=0, eos_id=eos)
    for row, whole, prompt in zip(rows, free, prompts):
        new = whole[len(prompt):]
        assert row == prompt + (new[:new.index(eos) + 1] if eos in new else new)
    assert len(rows[0]) < len(free[0])
    assert model.generate([[eos, 1]], 3, temperature=0, eos_id=eos)[0][:2] == [eos, 1]      # a prompt may hold it


def test_nothing_to_do_gives_back_the_prompts():
    model = gpt()
    assert model.generate([1, 2], 0, temperature=0) == [1, 2]
    assert model.generate([[1], [2]], 0, temperature=0) == [[1], [2]]
    assert model.generate(np.array([[1, 2], [3, 4]]), 1, temperature=0)[1][:2] == [3, 4]


@pytest.mark.parametrize(("ids", "options", "message"), [
    ([1], {}, "give rng"), ([1], {"temperature": -1}, "temperature must be 0"), ([1], {"top_k": 0}, "top_k must be 1"),
    ([1], {"temperature": np.nan}, "temperature must be 0 .* got nan"),
    ([1], {"max_new_tokens": -1, "temperature": 0}, "max_new_tokens must be 0 or more, got -1"),
    ([1], {"top_p": 0}, r"top_p must be in \(0, 1\]"), ([1], {"min_p": 2}, r"min_p must be in \[0, 1\]"),
    ([[1], []], {"temperature": 0}, "at least one token"),
    ([1], {"temperature": 0, "eos_id": 50256}, r"eos_id must be within 0 \.\. 29, got 50256"),
    ([1] * 22, {"temperature": 0}, "25 positions, block_size is 24"),
    ([40], {"temperature": 0}, r"ids must be within 0 \.\. 29, got 40")])
def test_bad_requests_are_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        gpt().generate(ids, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(("option", "wrong", "kind"), [
    ("temperature", None, "a real number"), ("top_k", 1.5, "an integer"), ("top_p", "0.9", "a real number"),
    ("min_p", "0.1", "a real number"), ("eos_id", 2.0, "an integer"), ("eos_id", "end", "an integer"),
    ("max_new_tokens", 1.5, "an integer")])
def test_an_option_that_is_no_number_is_named(option, wrong, kind):
    options = {"max_new_tokens": 3, "rng": np.random.default_rng(0), option: wrong}
    with pytest.raises(TypeError, match=f"generate: {option} must be {kind}, got {wrong!r}"):
        gpt().generate([1], **options)


def test_a_seed_in_place_of_a_generator_is_refused():
    with pytest.raises(TypeError, match=r"generate: rng must be a numpy\.random\.Generator, got int; make one with"):
        gpt().generate([1], 3, rng=0)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_nothing_is_drawn_from_nan(options):
    logits = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 2.0]])
    with pytest.raises(ValueError, match="logits of row 1 are NaN"):
        sample(logits, rng=np.random.default_rng(0), **options)
    model = gpt()
    model.norm.weight.data[0] = np.nan
    with pytest.raises(ValueError, match="logits of row 0 are NaN"):
        model.generate([1, 2], 3, rng=np.random.default_rng(0), **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1e-19, 1e-21, 1e-37, 1e-40, 1e-60, 1e-320])
def test_the_lower_the_temperature_the_greedier(temperature, dtype):
    logits = np.array([[1, -np.inf, 200], [-3, -2, -5]], dtype)
    assert sample(logits, temperature=temperature, rng=np.random.default_rng(0)).tolist() == [2, 1]


@pytest.mark.parametrize("ids", [[1.5, 2.5], np.ones((2, 3)), [["1"]], 5, None, "abc", [[1], 2]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(TypeError, match="generate: ids must be lists of integers, the ids of tokens, got"):
        gpt().generate(ids, 3, temperature=0)
