import copy
import dataclasses

import pytest

from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_requests import Malformed, Piece, body_of, group_seed, pieces_of, request_digest, samples_of

SETTINGS = SamplingSettings(max_new_tokens=3, stop_ids=(2, 9), seed=7, temperature=0.7)
PIECE = Piece(prompt=(1, 5), prompt_id=4, first=2, count=2, step=11)
ANSWER = {
    "choices": [
        {
            "index": 1,
            "token_ids": [3, 4, 5],
            "logprobs": {"token_logprobs": [-0.5, 0, 1e-5]},
            "finish_reason": "length",
        },
        {
            "index": 0,
            "token_ids": [9],
            "logprobs": {"token_logprobs": [-1]},
            "finish_reason": "stop",
            "prompt_token_ids": [1, 5],
        },
    ]
}


def believed(answer, piece=PIECE, settings=SETTINGS):
    return samples_of(answer, piece, settings, vocab_size=10, version=6)


def test_samples_stand_in_their_order():
    first, second = believed(ANSWER)
    assert (first.token_ids.tolist(), first.logprobs.tolist(), first.finish_reason) == ([9], [-1.0], "stop")
    assert (second.token_ids.tolist(), second.finish_reason) == ([3, 4, 5], "length")
    # What is rounded above 0 becomes 0.
    assert second.logprobs.tolist() == [-0.5, 0.0, 0.0]
    assert {first.version, second.version} == {6}


@pytest.mark.parametrize(
    "change",
    [
        {"index": 0},
        {"index": 2},
        {"index": None},
        {"token_ids": None},
        {"token_ids": []},
        {"token_ids": [3, 4]},
        {"token_ids": [3, 4, 10]},
        {"token_ids": [3, 4, -1]},
        {"token_ids": [3, 4, 5.0]},
        {"token_ids": [3, 4, True]},
        {"token_ids": [3, 4, 5, 6], "logprobs": {"token_logprobs": [0] * 4}},
        {"token_ids": [3, 9, 5]},
        {"token_ids": [3, 4, 9]},
        {"finish_reason": "stop"},
        {"finish_reason": "abort"},
        {"finish_reason": None},
        {"logprobs": None},
        {"logprobs": {"token_logprobs": [0, 0]}},
        {"logprobs": {"token_logprobs": [0, 0, None]}},
        {"logprobs": {"token_logprobs": [0, 0, float("nan")]}},
        {"logprobs": {"token_logprobs": [0, 0, float("-inf")]}},
        {"logprobs": {"token_logprobs": [0, 0, 0.1]}},
        {"prompt_token_ids": [1, 6]},
    ],
)
def test_what_is_not_an_answer_to_the_request_is_not_believed(change):
    broken = copy.deepcopy(ANSWER)
    broken["choices"][0] |= change
    with pytest.raises(Malformed):
        believed(broken)


@pytest.mark.parametrize("answer", [None, [], {}, {"choices": None}, {"choices": ANSWER["choices"][:1]}])
def test_what_is_no_answer_at_all(answer):
    with pytest.raises(Malformed, match="need 2 choices"):
        believed(answer)


def test_length_before_the_limit_is_a_server_with_less_room():
    short = copy.deepcopy(ANSWER)
    short["choices"][0] |= {"token_ids": [3], "logprobs": {"token_logprobs": [0]}}
    with pytest.raises(Malformed, match="need max_tokens where nothing stopped it"):
        believed(short)


def test_every_option_is_said():
    body = body_of(PIECE, SETTINGS, "policy")
    assert body | {"seed": 0} == {
        "model": "policy",
        "prompt": [1, 5],
        "n": 2,
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [2, 9],
        "ignore_eos": True,
        "seed": 0,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }


def test_a_samples_seed_is_that_of_its_group_and_its_number():
    assert body_of(PIECE, SETTINGS, "m")["seed"] == group_seed(7, 11, 4) + 2
    seeds = {group_seed(seed, step, prompt) for seed in (0, 1) for step in (None, 0, 1) for prompt in range(50)}
    assert len(seeds) == 300
    # vLLM takes 64 bits with a sign and adds numbers of samples.
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert group_seed(2**32 - 1, 2**31, 2**31) == group_seed(2**32 - 1, 2**31, 2**31)


def test_what_is_missing_of_groups_is_cut_into_pieces():
    pieces = pieces_of([[1], [2], [3]], [8, 9, 7], [range(5), [0, 2, 3, 4, 6], []], 3, 2)
    assert [(piece.prompt_id, piece.first, piece.count) for piece in pieces] == [
        (8, 0, 2), (8, 2, 2), (8, 4, 1), (9, 0, 1), (9, 2, 2), (9, 4, 1), (9, 6, 1),
    ]  # fmt: skip


def test_a_digest_is_of_all_that_a_sample_depends_on_but_the_weights():
    digest = request_digest([1, 5], SETTINGS, 3)
    assert digest == request_digest((1, 5), SETTINGS, 3)
    hotter = dataclasses.replace(SETTINGS, temperature=0.9)
    others = {
        request_digest([1, 6], SETTINGS, 3),
        request_digest([1, 5], hotter, 3),
        request_digest([1, 5], SETTINGS, 4),
    }
    assert len(others | {digest}) == 4
