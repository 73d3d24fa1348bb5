"""What is asked of a vLLM server and what is believed of its answer: /v1/completions, token ids both ways.

The numbers of a sample follow from the run's seed, step, prompt id and sample alone: vLLM draws sample i of a request
with its seed + i, so a piece of a group that begins at sample k asks with the group's seed + k.
"""

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from r1jax.rollout.settings import SamplingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Samples of one prompt that one request asks for."""

    prompt: tuple[int, ...]
    prompt_id: int
    first: int
    """Number of its first sample among those of the prompt."""
    count: int
    step: int | None
    """None: drawn outside of training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion."""

    token_ids: np.ndarray
    """int32 [T], with the stop token where there was one."""
    logprobs: np.ndarray
    """float32 [T], under the distribution that the tokens were drawn from."""
    finish_reason: Literal["stop", "length"]
    version: int | None
    """Of the weights that drew it; None: those that the server was started with."""


class Malformed(ValueError):
    """An answer that is not what was asked for."""


def pieces_of(
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    numbers: Sequence[Sequence[int]],
    step: int | None,
    size: int,
) -> list[Piece]:
    """The requests for the samples of each prompt that have these numbers (ascending), at most `size` in one."""
    return [
        Piece(prompt=tuple(map(int, prompt)), prompt_id=int(prompt_id), first=first, count=count, step=step)
        for prompt, prompt_id, wanted in zip(prompts, prompt_ids, numbers, strict=True)
        for first, count in _runs(wanted, size)
    ]


def _runs(numbers: Sequence[int], size: int) -> list[tuple[int, int]]:
    """(first, count) of numbers that follow each other, at most `size` of them."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]) and found[-1][1] < size:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def group_seed(seed: int, step: int | None, prompt_id: int) -> int:
    """The seed of a prompt's first sample, 62 bits: a sample's number is added and must not overflow 63."""
    packed = struct.pack("<qqq", seed, -1 if step is None else step, prompt_id)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 2


def body_of(piece: Piece, settings: SamplingSettings, model: str) -> dict[str, Any]:
    """The request. Every option that changes the distribution is said: the server's own defaults never count."""
    greedy = settings.temperature == 0
    return {
        "model": model,
        "prompt": list(piece.prompt),
        # vLLM takes one greedy sample a request, as all are the same.
        "n": 1 if greedy else piece.count,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": 1.0 if greedy else settings.top_p,
        "top_k": -1 if greedy else settings.top_k or -1,
        "min_p": 0.0 if greedy else settings.min_p or 0.0,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # Ours alone end a completion, whatever the server takes for the model's.
        "stop_token_ids": list(settings.stop_ids),
        "ignore_eos": True,
        "seed": group_seed(settings.seed, piece.step, piece.prompt_id) + piece.first,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }


def request_digest(prompt: Sequence[int], settings: SamplingSettings, seed: int) -> str:
    """What tells a sample from all others that could be asked for, but for the weights: prompt, settings, seed."""
    asked = json.dumps([list(map(int, prompt)), dataclasses.asdict(settings), seed])
    return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()


def samples_of(
    content: Any, piece: Piece, settings: SamplingSettings, *, vocab_size: int, version: int | None
) -> list[Sample]:
    """The piece's samples in their order; raises `Malformed` for an answer that is not one to its request."""
    choices = content.get("choices") if isinstance(content, dict) else None
    wanted = 1 if settings.temperature == 0 else piece.count
    _believe(isinstance(choices, list) and len(choices) == wanted, f"need {wanted} choices")
    by_index: dict[int, Sample] = {}
    for choice in choices or ():
        _believe(isinstance(choice, dict), "need choices that are objects")
        index = choice.get("index")
        _believe(type(index) is int and 0 <= index < wanted and index not in by_index, "need each choice once")
        by_index[index] = _sample(choice, piece, settings, vocab_size, version)
    found = [by_index[index] for index in range(wanted)]
    return found * piece.count if wanted < piece.count else found


def _sample(
    choice: Mapping[str, Any], piece: Piece, settings: SamplingSettings, vocab_size: int, version: int | None
) -> Sample:
    tokens, reason = choice.get("token_ids"), choice.get("finish_reason")
    table = choice.get("logprobs")
    logprobs = table.get("token_logprobs") if isinstance(table, dict) else None
    asked = choice.get("prompt_token_ids")
    _believe(asked is None or asked == list(piece.prompt), "need the prompt that was sent")
    _believe(isinstance(tokens, list) and isinstance(logprobs, list), "need token_ids and token_logprobs")
    assert isinstance(tokens, list) and isinstance(logprobs, list)
    _believe(1 <= len(tokens) <= settings.max_new_tokens, f"need 1 to {settings.max_new_tokens} tokens")
    _believe(len(tokens) == len(logprobs), "need a log-probability for each token")
    _believe(all(type(token) is int and 0 <= token < vocab_size for token in tokens), "need ids of the vocabulary")
    _believe(all(_is_logprob(value) for value in logprobs), "need log-probabilities that are finite and at most 0")
    _believe(reason in ("stop", "length"), "need finish_reason stop or length")
    stops = [place for place, token in enumerate(tokens) if token in settings.stop_ids]
    # Whichever way it ended, a stop id stands at the end or nowhere.
    _believe(
        stops == ([len(tokens) - 1] if reason == "stop" else []), "need a stop id at the end, and only where it stopped"
    )
    _believe(reason == "stop" or len(tokens) == settings.max_new_tokens, "need max_tokens where nothing stopped it")
    return Sample(
        token_ids=np.array(tokens, np.int32),
        logprobs=np.minimum(np.array(logprobs, np.float32), 0),
        finish_reason="stop" if reason == "stop" else "length",
        version=version,
    )


def _is_logprob(value: Any) -> bool:
    # A likely token's may be rounded a little above 0.
    return type(value) in (int, float) and math.isfinite(value) and value <= 1e-3


def _believe(condition: bool, rule: str) -> None:
    if not condition:
        raise Malformed(rule)
