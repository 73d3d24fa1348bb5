"""An engine whose samples come from the embedded one, and which loses its server when a test says."""

from collections.abc import Sequence
from typing import Any

from r1jax.batch import Rollout
from r1jax.config.errors import RunFailure
from r1jax.rollout.engine import RolloutEngine
from r1jax.rollout.journal import Label
from r1jax.rollout.settings import SamplingSettings


class Losing:
    """A `RolloutEngine` that notes what is asked of it."""

    def __init__(self, inner: RolloutEngine, *failures: RunFailure | None) -> None:
        """failures: what the calls of generate raise, in their order; None, and all behind, draw."""
        self._inner, self._failures = inner, list(failures)
        self.version: int | None = None
        self.label: Label | None = None
        self.events: list[tuple[Any, ...]] = []

    def sync(self, params: Any, version: int, *, lost: bool = False) -> None:
        self.events.append(("lost" if lost else "sync", version))
        self._inner.sync(params, version, lost=lost)
        self.version, self.label = version, Label(version, f"weights of {version}")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        step: int,
        settings: SamplingSettings | None = None,
    ) -> list[list[Rollout]]:
        self.events.append(("generate", step, self.version))
        if self._failures and (failure := self._failures.pop(0)) is not None:
            raise failure
        return self._inner.generate(prompts, prompt_ids, num_generations=num_generations, step=step, settings=settings)

    def counts(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._inner.close()
