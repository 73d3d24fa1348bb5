"""A server is looked at before it is used: is it there, ours, of this model, and does it say what it samples from.

What does not fit raises one line with what to change. Nothing here changes the server's weights.
"""

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from r1jax.config.errors import UserError, need, shown
from r1jax.models.config import DecoderConfig
from r1jax.rollout.vllm_client import Clients, Server, VllmClient
from r1jax.rollout.vllm_http import Failure

START_LINE = "start it with launch/vllm_server.sh MODEL_DIR"
# Gaps between log-probabilities of a probe are multiplied by 1 / temperature where the temperature is in them.
_PROBE_TEMPERATURE = 0.5


class Unreachable(UserError):
    """A server that does not answer, whatever it would say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What the trainer, or the user, needs of a server."""

    config: DecoderConfig
    longest: int
    """Tokens of the longest prompt and its completion together."""
    stop_ids: tuple[int, ...]
    probe: tuple[int, ...]
    """A prompt of the model's own tokens."""
    model: str | None = None
    """The name it must be served under; None: the only one it is served under."""
    field: str = "vllm_server_base_url"
    """What the user calls the servers' addresses."""
    length_field: str = "max_completion_length"
    """What the user calls the longest completion."""
    pushed: bool = False
    """Whether weights are pushed before anything is drawn: those that are there do not matter then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What the servers have in common, and what each one says of itself."""

    model: str
    states: tuple[dict[str, Any], ...]

    @property
    def dtype(self) -> str:
        """What the servers compute in."""
        return self.states[0]["dtype"]


def check_servers(client: VllmClient, expected: Expected, *, start_seconds: float) -> Found:
    """What was found; raises `UserError` for a server that does not come up within start_seconds or does not fit."""

    async def look(clients: Clients) -> list[tuple[str, dict[str, Any]]]:
        return await clients.each(lambda server: _check(clients, server, expected, start_seconds))

    found = client.run(look)
    names = {name for name, _ in found}
    if len(names) > 1:
        raise need(expected.field, "servers of one model", ", ".join(sorted(names)), "give all the same name and model")
    for key in ("dtype", "vllm"):
        if len(values := {state[key] for _, state in found}) > 1:
            raise need(expected.field, f"servers of one {key}", ", ".join(sorted(values)), "start them alike")
    for server, (_, state) in zip(client.in_use, found, strict=True):
        server.instance = state["instance"]
    return Found(model=names.pop(), states=tuple(state for _, state in found))


async def _check(
    clients: Clients, server: Server, expected: Expected, start_seconds: float
) -> tuple[str, dict[str, Any]]:
    field = expected.field
    await _until_up(clients, server, field, start_seconds)
    try:
        model = await _model_name(clients, server, expected)
        state = await _state(clients, server, field)
        _check_state(server, state, expected)
        await _check_mode(clients, server, expected, model, state)
        await _check_stops(clients, server, expected, model)
    except Failure as failure:
        raise _named(failure, field) from failure
    return model, state


def _named(failure: Failure, field: str) -> UserError:
    """The failure as the user's to mend."""
    if "answered 401" in failure.what or "answered 403" in failure.what:
        advice = "set R1JAX_VLLM_KEY to the key that the server was started with"
        return need("R1JAX_VLLM_KEY", f"the key of {failure.url}", "another one", advice)
    return Unreachable(str(need(field, "a server that answers", str(failure), f"see its log; {START_LINE}")))


async def _until_up(clients: Clients, server: Server, field: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            await clients.call(server, "/health", None, max(0.1, min(10.0, left)), plain=True)
            return
        except Failure as failure:
            if time.monotonic() + 1 > deadline:
                got = f"none from {failure} in {seconds:g} s"
                raise Unreachable(str(need(field, "an answer to /health", got, START_LINE))) from failure
        await asyncio.sleep(1)


async def _model_name(clients: Clients, server: Server, expected: Expected) -> str:
    content = (await clients.call(server, "/v1/models")).content
    rows = content.get("data") if isinstance(content, dict) else None
    names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if expected.model is not None and expected.model in names:
        return expected.model
    if expected.model is None and len(names) == 1 and isinstance(names[0], str):
        return names[0]
    rule = "one model" if expected.model is None else f"the model {expected.model}"
    raise need(expected.field, f"{rule} served at {server.url}", shown(names), START_LINE)


async def _state(clients: Clients, server: Server, field: str) -> dict[str, Any]:
    try:
        return await clients.rpc(server, "r1jax_state")
    except Failure as failure:
        if "401" in failure.what or failure.kind in ("timeout", "connection"):
            raise
        rule = f"r1jax's worker extension in {server.url}"
        raise need(field, rule, failure.what, START_LINE) from failure


def _check_state(server: Server, state: dict[str, Any], expected: Expected) -> None:
    """Raises `UserError` unless the server has the trainer's model, room for its texts and no torn weights."""
    field, config = expected.field, expected.config
    if not state.get("instance"):
        raise need(field, f"a name of the process in {server.url}", "none", START_LINE)
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_layers": config.num_layers}
    for key, size in sizes.items():
        if state.get(key) != size:
            rule = f"{key} {size}, as model_name_or_path has, at {server.url}"
            raise need(field, rule, shown(state.get(key)), "serve the model that is trained")
    room = state.get("max_model_len")
    if type(room) is not int or room < expected.longest:
        rule = f"room for {expected.longest} tokens (prompt and {expected.length_field}) at {server.url}"
        raise need(field, rule, f"--max-model-len {room}", f"start it with --max-model-len {expected.longest} or more")
    if state.get("torn") and not expected.pushed:
        raise need(field, f"whole weights at {server.url}", "a push that was cut off", "start the server again")


async def _check_mode(clients: Clients, server: Server, expected: Expected, model: str, state: dict[str, Any]) -> None:
    """Raises unless log-probabilities are those at the temperature: gaps between the likeliest tokens' must grow."""
    plain = await _gap(clients, server, expected, model, 1.0)
    sharp = await _gap(clients, server, expected, model, _PROBE_TEMPERATURE)
    if abs(sharp * _PROBE_TEMPERATURE - plain) > 0.02 * plain + 1e-3:
        rule = f"log-probabilities at the temperature sampled with from {server.url}"
        gaps = f"a gap of {plain:.3f} at 1 and {sharp:.3f} at {_PROBE_TEMPERATURE}"
        got = f"--logprobs-mode {state.get('logprobs_mode')}, {gaps}"
        raise need(
            expected.field, rule, got, "start it with --logprobs-mode processed_logprobs (launch/vllm_server.sh does)"
        )


async def _gap(clients: Clients, server: Server, expected: Expected, model: str, temperature: float) -> float:
    """Between the log-probabilities of the likeliest tokens behind the probe and those of the fifth."""
    body = {"model": model, "prompt": list(expected.probe), "max_tokens": 1, "temperature": temperature, "seed": 1}
    body |= {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "logprobs": 5}
    body |= {"return_tokens_as_token_ids": True}
    content = (await clients.call(server, "/v1/completions", body)).content
    try:
        values = sorted(map(float, content["choices"][0]["logprobs"]["top_logprobs"][0].values()), reverse=True)
        return values[0] - values[4]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Failure("malformed", server.url, "no top_logprobs of the probe") from error


async def _check_stops(clients: Clients, server: Server, expected: Expected, model: str) -> None:
    """Raises unless each stop id, which alone is allowed here, ends a completion and is part of it."""
    for stop in expected.stop_ids:
        body = {"model": model, "prompt": list(expected.probe), "max_tokens": 3, "temperature": 1.0, "seed": 1}
        body |= {"stop_token_ids": list(expected.stop_ids), "ignore_eos": True, "allowed_token_ids": [stop]}
        body |= {"return_token_ids": True}
        content = (await clients.call(server, "/v1/completions", body)).content
        try:
            choice = content["choices"][0]
            got = (choice["token_ids"], choice["finish_reason"])
        except (LookupError, TypeError) as error:
            rule = f"token ids from {server.url}"
            raise need(
                expected.field, rule, "none", "use vLLM 0.10.2 or newer, which knows return_token_ids"
            ) from error
        if got != ([stop], "stop"):
            rule = f"a completion that stop id {stop} ends at {server.url}"
            raise need(expected.field, rule, f"{got[0]} and {got[1]}", "serve the model that is trained")


def probe_prompt(prompts: Sequence[Sequence[int]], length: int = 16) -> tuple[int, ...]:
    """The beginning of the first prompt: what the model meets anyhow."""
    return tuple(map(int, prompts[0][:length]))
