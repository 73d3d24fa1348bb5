import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.config.errors import UserError
from r1jax.models.decoding import prefill, unstack
from r1jax.models.parameters import init_params
from r1jax.models.transformer import forward, logits
from r1jax.rollout.programs import finish_slots, start_slots, widen_slots
from r1jax.rollout.sampler import Sampler, batch_shape
from r1jax.rollout.settings import SamplingSettings

PROMPTS = [[7, 3, 9, 1, 4], [11], [2, 2, 8], list(range(20))]
STOPS = (5, 17)


@pytest.fixture(scope="module")
def config(configs):
    return configs["qwen3"]


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


@pytest.fixture(scope="module")
def sampler(params, config):
    return Sampler(params=unstack(params), config=config)


def draw(sampler, prompts=PROMPTS, *, num_generations=3, batch_size=16, prompt_ids=None, step=None, **changes):
    settings = SamplingSettings(**{"max_new_tokens": 12, "stop_ids": STOPS, **changes})
    return sampler.generate(
        prompts, settings, num_generations=num_generations, batch_size=batch_size, prompt_ids=prompt_ids, step=step
    )


@pytest.fixture(scope="module")
def next_logprobs(params, config):
    """tokens -> the training forward's log-probabilities after each of them, [T, V]."""
    program = jax.jit(lambda row, layout: logits(params, forward(params, row, layout, config)))

    def compute(tokens, temperature=1.0):
        row = jnp.asarray([[*tokens, *[0] * (64 - len(tokens))]])
        positions = jnp.arange(64)[None]
        layout = Layout(segment_ids=(positions < len(tokens)).astype(jnp.int32), positions=positions)
        scores = program(row, layout)[0] / jnp.float32(temperature)
        return np.asarray(jax.nn.log_softmax(scores))[: len(tokens)]

    return compute


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_training_forwards(sampler, next_logprobs, temperature):
    for prompt, completions in zip(PROMPTS, draw(sampler, temperature=temperature), strict=True):
        for completion in completions:
            expected = next_logprobs([*prompt, *completion.token_ids], temperature)[len(prompt) - 1 : -1]
            chosen = np.take_along_axis(expected, np.array(completion.token_ids)[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(completion.logprobs, chosen, atol=1e-5)
            np.testing.assert_array_equal(completion.policy_logprobs, completion.logprobs)


def test_greedy_follows_the_largest_logit(sampler, next_logprobs):
    found = draw(sampler, temperature=0, num_generations=1, stop_ids=())
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        likeliest = next_logprobs([*prompt, *completion.token_ids]).argmax(axis=-1)
        assert list(completion.token_ids) == likeliest[len(prompt) - 1 : -1].tolist()
        assert len(completion.token_ids) == 12


def test_a_completion_ends_with_its_first_stop_id_or_at_the_length(sampler):
    reasons = set()
    for completions in draw(sampler, num_generations=8):
        for completion in completions:
            stops = [place for place, token in enumerate(completion.token_ids) if token in STOPS]
            stopped = completion.finish_reason == "stop"
            assert stops == ([len(completion.token_ids) - 1] if stopped else [])
            assert stopped or len(completion.token_ids) == 12
            assert len(completion.logprobs) == len(completion.token_ids)
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_and_slot_change_no_sample(sampler, batch_size):
    assert_same(draw(sampler, batch_size=batch_size), draw(sampler))


def test_other_prompts_and_buckets_change_no_sample(sampler):
    alone = draw(sampler, [PROMPTS[1], PROMPTS[0]], prompt_ids=[1, 0])
    among = draw(sampler)
    assert_same(alone, [among[1], among[0]])
    # 12 and 17 new tokens are of different buckets; what both have is the same.
    longer = draw(sampler, max_new_tokens=17, stop_ids=())
    shorter = draw(sampler, stop_ids=())
    for long, short in zip(longer, shorter, strict=True):
        assert [one.token_ids[:12].tolist() for one in long] == [one.token_ids.tolist() for one in short]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [completion.token_ids.tolist() for completion in one] == [a.token_ids.tolist() for a in other]
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
            assert a.finish_reason == b.finish_reason


def test_samples_of_a_prompt_differ_and_so_do_seeds_and_prompt_ids(sampler):
    same_prompt = draw(sampler, [PROMPTS[0], PROMPTS[0]], num_generations=2)
    drawn = [tuple(completion.token_ids) for completions in same_prompt for completion in completions]
    for changes in ({"seed": 1}, {"step": 0}, {"step": 1}, {"step": 2}):
        drawn += [tuple(completion.token_ids) for completion in draw(sampler, PROMPTS[:1], **changes)[0]]
    assert len(set(drawn)) == len(drawn)


def test_top_p_draws_from_the_nucleus_alone(sampler, next_logprobs):
    for prompt, completions in zip(PROMPTS, draw(sampler, top_p=0.5), strict=True):
        for completion in completions:
            scores = next_logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
            for token, logprob, row in zip(completion.token_ids, completion.logprobs, scores, strict=True):
                order = np.argsort(-row)
                nucleus = order[: int(np.searchsorted(np.cumsum(np.exp(row[order])), 0.5)) + 1]
                assert token in nucleus
                expected = row[token] - np.log(np.exp(row[nucleus]).sum())
                np.testing.assert_allclose(logprob, expected, atol=1e-5)


def test_both_log_probabilities_where_the_distribution_is_reshaped(sampler, next_logprobs):
    """The penalty counts prompt and completion; `policy_logprobs` know of the temperature alone."""
    changes = {"temperature": 0.8, "repetition_penalty": 1.6, "top_k": 7, "min_p": 0.02, "stop_ids": ()}
    differ = False
    for prompt, completions in zip(PROMPTS[:3], draw(sampler, PROMPTS[:3], **changes), strict=True):
        for completion in completions:
            tokens = [*prompt, *completion.token_ids.tolist()]
            plain = next_logprobs(tokens)
            for place, token in enumerate(completion.token_ids):
                seen = tokens[: len(prompt) + place]
                # Log-probabilities are logits but for a constant, which the penalty does not leave alone.
                scores = np.asarray(raw(sampler, seen), np.float64)
                policy = scores / 0.8 - np.log(np.exp(scores / 0.8).sum())
                np.testing.assert_allclose(completion.policy_logprobs[place], policy[token], atol=1e-5)
                np.testing.assert_allclose(scores - np.log(np.exp(scores).sum()), plain[len(seen) - 1], atol=1e-5)
                known = np.isin(np.arange(40), seen)
                scores = np.where(known, np.where(scores < 0, scores * 1.6, scores / 1.6), scores) / 0.8
                scores[scores < np.sort(scores)[-7]] = -np.inf
                scores[scores < scores.max() + np.log(0.02)] = -np.inf
                expected = scores[token] - np.log(np.exp(scores).sum())
                np.testing.assert_allclose(completion.logprobs[place], expected, atol=1e-5)
                differ |= abs(expected - policy[token]) > 0.1
    assert differ


def raw(sampler, tokens):
    """The logits after the tokens, by the sampler's own prefill."""
    padded = jnp.asarray([[*tokens, *[0] * (64 - len(tokens))]])
    return prefill_logits(sampler.params, padded, jnp.asarray([len(tokens)]), sampler.config)[0]


@partial(jax.jit, static_argnames="config")
def prefill_logits(params, tokens, lengths, config):
    return prefill(params, tokens, lengths, config)[0]


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        # (prompts, samples each, slots, devices) -> (side by side, prompts in a batch)
        ((4, 8, 1000, 1), (8, 4)),
        ((128, 8, 160, 1), (8, 20)),  # 7 batches of 20 rather than 6 of 20 and one of 8: the same here
        ((40, 8, 128, 1), (8, 14)),  # 3 batches of 14, not 16 + 16 + 8
        ((4, 3, 5, 1), (3, 1)),
        ((4, 3, 1, 1), (1, 1)),
        ((1, 8, 1000, 8), (1, 8)),  # one group over eight devices
        ((3, 8, 1000, 8), (3, 16)),  # pieces of 3, 3 and 2: nine of them
        ((16, 8, 1000, 8), (8, 16)),
        ((16, 8, 4, 8), (1, 8)),  # at least one slot a device
    ],
)
def test_batches_are_even_and_use_every_device(request_of, expected):
    assert batch_shape(*request_of) == expected


def test_completions_that_stop_early_never_widen_the_slots(sampler):
    """With every token a stop id, the later windows of a long limit are not even compiled."""
    before = num_compiled()[2]
    (completions,) = draw(sampler, [[1] * 3], max_new_tokens=60, stop_ids=tuple(range(40)))
    assert {len(completion.token_ids) for completion in completions} == {1}
    assert {completion.finish_reason for completion in completions} == {"stop"}
    assert num_compiled()[2] == before


def test_a_stop_id_as_the_last_token_is_a_stop(sampler):
    (completions,) = draw(sampler, [[1] * 3], max_new_tokens=1, stop_ids=tuple(range(40)))
    assert {completion.finish_reason for completion in completions} == {"stop"}
    (completions,) = draw(sampler, [[1] * 3], max_new_tokens=1, stop_ids=())
    assert {completion.finish_reason for completion in completions} == {"length"}


def test_the_same_buckets_compile_nothing_again(sampler, params, config):
    changes = {"num_generations": 4, "max_new_tokens": 40, "stop_ids": ()}
    draw(sampler, [[1, 2], list(range(10))], **changes)
    compiled = num_compiled()
    other = Sampler(params=unstack(jax.tree.map(lambda leaf: leaf * 2, params)), config=config)
    changes |= {"max_new_tokens": 48, "temperature": 0.3, "stop_ids": (1,), "seed": 9}
    draw(other, [list(range(16)), [3]], prompt_ids=[7, 8], **changes)
    assert num_compiled() == compiled


def num_compiled():
    return [program._cache_size() for program in (start_slots, finish_slots, widen_slots)]  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, "prompts: need at least one token in each, got none in prompt 1;"),
        ({"prompts": [[1] * 53]}, "max_new_tokens: need prompt .* within the model's 64 positions, got 53 \\+ 12"),
        ({"prompts": [[40]]}, "prompts: need token ids below 40, got 40"),
        ({"temperature": -0.1}, "temperature: need x >= 0"),
        ({"temperature": float("nan")}, "temperature: need x >= 0"),
        ({"top_p": 0.0}, "top_p: need 0 < x <= 1"),
        ({"top_p": 1.1}, "top_p: need 0 < x <= 1"),
        ({"top_k": -1}, "top_k: need x >= 0"),
        ({"min_p": 1.5}, "min_p: need 0 <= x <= 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: need x > 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: need x > 0"),
        ({"num_generations": 0}, "num_generations"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sampler, changes, message):
    with pytest.raises(UserError, match=message):
        draw(sampler, changes.pop("prompts", PROMPTS), **changes)


def test_a_prompt_may_fill_the_context(sampler):
    (completions,) = draw(sampler, [[1] * 52], stop_ids=())
    assert {len(completion.token_ids) for completion in completions} == {12}


def test_a_model_of_unknown_length_takes_any_prompt(params, config):
    unknown = dataclasses.replace(config, max_position_embeddings=0)
    (completions,) = draw(Sampler(params=unstack(params), config=unknown), [[1] * 60], num_generations=1)
    assert len(completions) == 1


def test_no_prompts_no_completions(sampler):
    assert draw(sampler, []) == []
