import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.batch import Layout
from r1jax.config.errors import UserError
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import unstack
from r1jax.models.parameters import init_params
from r1jax.models.transformer import forward, logits
from r1jax.rollout.programs import finish_slots, start_slots
from r1jax.rollout.sampler import Sampler

CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    rope_theta=1e4,
    qk_norm=True,
    tied_embeddings=True,
    # Logits with a spread of about 1: sampled completions differ, and a stop id is met now and then.
    initializer_range=0.2,
    max_position_embeddings=64,
)
PROMPTS = [[7, 3, 9, 1, 4], [11], [2, 2, 8], list(range(20))]
STOPS = (5, 17)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def sampler(params):
    return Sampler(params=unstack(params), config=CONFIG)


def draw(sampler, prompts=PROMPTS, **changes):
    settings = {"num_generations": 3, "max_new_tokens": 12, "stop_ids": STOPS, "batch_size": 16, **changes}
    return sampler.generate(prompts, **settings)


@jax.jit
def forward_logits(params, row, layout):
    return logits(params, forward(params, row, layout, CONFIG))


def next_logprobs(params, tokens, temperature=1.0):
    """The training forward's log-probabilities after each token, [T, V]."""
    row = jnp.asarray([tokens + [0] * (64 - len(tokens))])
    positions = jnp.arange(64)[None]
    layout = Layout(segment_ids=(positions < len(tokens)).astype(jnp.int32), positions=positions)
    scores = forward_logits(params, row, layout)[0] / jnp.float32(temperature)
    return np.asarray(jax.nn.log_softmax(scores))[: len(tokens)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_training_forwards(sampler, params, temperature):
    for prompt, completions in zip(PROMPTS, draw(sampler, temperature=temperature), strict=True):
        for completion in completions:
            expected = next_logprobs(params, [*prompt, *completion.token_ids], temperature)[len(prompt) - 1 : -1]
            chosen = np.take_along_axis(expected, np.array(completion.token_ids)[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(completion.logprobs, chosen, atol=1e-5)


def test_greedy_follows_the_largest_logit(sampler, params):
    found = draw(sampler, temperature=0, num_generations=1, stop_ids=())
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        likeliest = next_logprobs(params, [*prompt, *completion.token_ids]).argmax(axis=-1)
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
        assert [completion.token_ids[:12] for completion in long] == [completion.token_ids for completion in short]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [completion.token_ids for completion in one] == [completion.token_ids for completion in other]
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
            assert a.finish_reason == b.finish_reason


def test_samples_of_a_prompt_differ_and_so_do_seeds_and_prompt_ids(sampler):
    same_prompt = draw(sampler, [PROMPTS[0], PROMPTS[0]], num_generations=2)
    drawn = [completion.token_ids for completions in same_prompt for completion in completions]
    drawn += [completion.token_ids for completion in draw(sampler, PROMPTS[:1], seed=1)[0]]
    assert len(set(drawn)) == len(drawn)


def test_top_p_draws_from_the_nucleus_alone(sampler, params):
    for prompt, completions in zip(PROMPTS, draw(sampler, top_p=0.5), strict=True):
        for completion in completions:
            scores = next_logprobs(params, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
            for token, logprob, row in zip(completion.token_ids, completion.logprobs, scores, strict=True):
                order = np.argsort(-row)
                nucleus = order[: int(np.searchsorted(np.cumsum(np.exp(row[order])), 0.5)) + 1]
                assert token in nucleus
                expected = row[token] - np.log(np.exp(row[nucleus]).sum())
                np.testing.assert_allclose(logprob, expected, atol=1e-5)


def test_the_same_buckets_compile_nothing_again(sampler, params):
    draw(sampler)
    compiled = num_compiled()
    other = Sampler(params=unstack(jax.tree.map(lambda leaf: leaf * 2, params)), config=CONFIG)
    draw(other, [[1, 2], list(range(17))], num_generations=5, temperature=0.3, max_new_tokens=9, stop_ids=[1], seed=9)
    assert num_compiled() == compiled


def num_compiled():
    return [program._cache_size() for program in (start_slots, finish_slots)]  # pyright: ignore


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


def test_a_model_of_unknown_length_takes_any_prompt(params):
    unknown = dataclasses.replace(CONFIG, max_position_embeddings=0)
    (completions,) = draw(Sampler(params=unstack(params), config=unknown), [[1] * 60], num_generations=1)
    assert len(completions) == 1


def test_no_prompts_no_completions(sampler):
    assert draw(sampler, []) == []
