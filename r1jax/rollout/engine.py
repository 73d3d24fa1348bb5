"""Who draws the rollouts of a run: the `RolloutEngine` protocol, and the engine embedded in the trainer's process."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from r1jax.batch import Rollout, Turn, VersionSpan
from r1jax.models.attention.backends import Backend
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import DecodeParams
from r1jax.models.parameters import Params
from r1jax.rollout.journal import Label
from r1jax.rollout.sampler import Completion, Sampler, check_prompt
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.slots import room_on
from r1jax.rollout.weights import WeightSync

EVALUATION = 2**30
"""From this step on random numbers are evaluation's: it draws others than training."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws completions with the weights that it was given last."""

    @property
    def version(self) -> int | None:
        """The optimizer step that wrote the weights it has; None: it has none."""
        ...

    @property
    def label(self) -> Label | None:
        """What a journal of samples calls these weights; None where no journal is kept."""
        ...

    def sync(self, params: Params, version: int, *, lost: bool = False) -> None:
        """Takes over the trainer's parameters (stacked, float32, on its mesh), written by optimizer step `version`.

        lost: who samples is known to have gone, and is waited for first.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        step: int,
        settings: SamplingSettings | None = None,
    ) -> list[list[Rollout]]:
        """Each prompt's rollouts, in the prompts' order; settings replace those that the engine was made with.

        A rollout's random numbers follow from the seed, the step, its prompt id and its number among the prompt's.
        """
        ...

    def counts(self) -> dict[str, float]:
        """What went wrong in this process since the last call, by the names of metrics."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds."""
        ...


class EmbeddedEngine:
    """Samples on the trainer's own devices, each process for the prompts that it is given."""

    def __init__(
        self,
        config: DecoderConfig,
        mesh: Mesh,
        settings: SamplingSettings,
        *,
        dtype: str = "float32",
        backend: Backend = "xla",
        max_slots: int | None = None,
    ) -> None:
        """mesh: the trainer's. backend: whose attention is used. max_slots: completions drawn at a time by this
        process; None: as memory and weights suggest. Raises `UserError` where a tensor group is spread over
        processes."""
        self._config, self._settings, self._max_slots = config, settings, max_slots
        self._backend: Backend = backend
        self._weights = WeightSync(config, mesh, dtype)
        self._room = room_on(self._weights.mesh, config, dtype)
        self._params: DecodeParams | None = None
        self.version: int | None = None
        self.label: Label | None = None

    def sync(self, params: Params, version: int, *, lost: bool = False) -> None:
        """Takes over the trainer's parameters; every process must call it. Nothing here is ever lost."""
        del lost
        self._params = None  # the old ones go before the new ones come
        self._params, self.version = self._weights(params), version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        step: int,
        settings: SamplingSettings | None = None,
    ) -> list[list[Rollout]]:
        """Each prompt's rollouts, in the prompts' order, drawn on this process's devices.

        Raises `UserError` for a prompt that the model cannot take or that leaves no room for a completion.
        """
        assert self._params is not None and self.version is not None, "sync comes before generate"
        settings = settings or self._settings
        for row, prompt in enumerate(prompts):
            name = f"prompt {prompt_ids[row]}"
            check_prompt(prompt, self._config, settings.max_new_tokens, name, "max_completion_length")
        sampler = Sampler(params=self._params, config=self._config, mesh=self._weights.mesh, backend=self._backend)
        drawn = sampler.generate(
            prompts,
            settings,
            num_generations=num_generations,
            prompt_ids=prompt_ids,
            step=step,
            batch_size=self._max_slots or self._room.slots(max(map(len, prompts), default=1), settings.max_new_tokens),
        )
        return [
            [as_rollout(prompt, one, prompt_id, sample, self.version) for sample, one in enumerate(completions)]
            for prompt, prompt_id, completions in zip(prompts, prompt_ids, drawn, strict=True)
        ]

    def counts(self) -> dict[str, float]:
        """Nothing: what goes wrong here ends the run."""
        return {}

    def close(self) -> None:
        """Lets go of the weights."""
        self._params = self.version = None


def as_rollout(
    prompt: Sequence[int], completion: Completion, prompt_id: int, sample: int, version: int | None
) -> Rollout:
    """The completion behind its prompt, as one turn, written by the weights of one version."""
    assert version is not None
    start, stop = len(prompt), len(prompt) + len(completion.token_ids)

    def behind_prompt(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros(start, numbers.dtype), numbers])

    return Rollout(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.concatenate([np.asarray(prompt, np.int32), completion.token_ids]),
        action_mask=behind_prompt(np.ones(stop - start, np.int32)),
        logprobs=behind_prompt(completion.logprobs),
        policy_logprobs=behind_prompt(completion.policy_logprobs),
        versions=(VersionSpan(start, stop, version),),
        turns=(Turn(start, stop, completion.finish_reason),),
    )
