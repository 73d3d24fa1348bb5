"""What flows between the parts: frozen dataclasses of arrays, registered as pytrees.

Letters used for shapes throughout the package: B rows, T tokens, D model, N query heads, K kv heads, H head dim,
F hidden of the MLP, V vocabulary, L layers, A micro-batches of an optimizer step, S cache slots.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# numpy on the host, jax on a device, ShapeDtypeStruct or a sharding in abstract trees: all of them are leaves here.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tokens of a row may see each other."""

    segment_ids: Leaf
    """[B, T] int32: 0 is padding, 1, 2, ... are the documents of a row."""
    positions: Leaf
    """[B, T] int32: index of the token within its document, from 0."""
    lengths: Leaf | None = None
    """[B, M] int32: tokens of each document of a row, 0 behind its last one; None: not counted."""

    def counted(self, max_segments: int) -> "Layout":
        """The layout with lengths, of rows that have at most max_segments documents."""
        numbers = np.arange(1, max_segments + 1, dtype=np.int32)
        is_of = self.segment_ids[:, None, :] == numbers[None, :, None]
        return dataclasses.replace(self, lengths=jnp.sum(is_of, axis=2, dtype=jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows of packed documents; every leaf is [B, T], or [A, B, T] for the micro-batches of one optimizer step."""

    tokens: Leaf
    """int32 token ids; padding holds 0."""
    positions: Leaf
    """int32: index of the token within its document."""
    segment_ids: Leaf
    """int32: 0 is padding, 1, 2, ... are the documents of a row."""
    loss_mask: Leaf
    """int32: 1 means "train on this token", the token itself being the target; 0 on each document's first token."""
    loss_weight: Leaf
    """float32: weight of the token's loss in the whole optimizer step, so that device code only ever sums."""
    advantages: Leaf | None = None
    """GRPO: float32, that of the token's completion."""
    sampler_logprobs: Leaf | None = None
    """GRPO: float32 log-probability of the token when it was sampled, at the temperature; 0 where loss_mask is 0."""
    old_logprobs: Leaf | None = None
    """GRPO: float32, the trainer's own log-probability of the token before the first update on it; None: not yet
    updated on, so that of the policy as it is."""
    ref_logprobs: Leaf | None = None
    """GRPO: float32 log-probability under the reference; None without one."""
    support_floor: Leaf | None = None
    """GRPO: float32 log-probability above which a token could be drawn here; None: all could."""
    surrogate_weight: Leaf | None = None
    """GRPO: float32 factor of the token's policy gradient, not of its KL term; None: 1."""
    entropy_weight: Leaf | None = None
    """GRPO: float32, what a nat of the token's entropy takes off the step's loss for a coefficient of 1; None:
    nothing."""
    max_segments: int = dataclasses.field(default=0, metadata={"static": True})
    """At least the documents of any row, for sums over each and for kernels that want their lengths; 0: not known."""

    @property
    def layout(self) -> Layout:
        """The part that attention reads; its documents are counted where max_segments says how many there may be."""
        layout = Layout(segment_ids=self.segment_ids, positions=self.positions)
        return layout.counted(self.max_segments) if self.max_segments else layout


class Turn(NamedTuple):
    """A stretch of a rollout that the policy wrote in one go."""

    start: int
    stop: int
    """Tokens [start, stop) of the rollout."""
    finish_reason: Literal["stop", "length"]
    """Whether a stop id ended it, or the limit of tokens."""


class VersionSpan(NamedTuple):
    """A stretch of a rollout that one version of the weights wrote."""

    start: int
    stop: int
    version: int
    """Optimizer steps done when these weights were taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled episode as a single stream of tokens, on the host; prompt and completion are the case of one turn."""

    prompt_id: int
    """Names the prompt among all prompts of the run."""
    sample: int
    """Number of the sample among those of its prompt."""
    tokens: np.ndarray
    """int32 [T]: what the policy read and wrote."""
    action_mask: np.ndarray
    """int32 [T]: 1 on the tokens that the policy wrote."""
    logprobs: np.ndarray
    """float32 [T]: log-probability of each action under the distribution it was drawn from; 0 elsewhere."""
    policy_logprobs: np.ndarray
    """float32 [T]: the same at the sampling temperature alone, before top_p, top_k, min_p and repetition_penalty."""
    versions: tuple[VersionSpan, ...]
    turns: tuple[Turn, ...]
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """What an environment keeps of the episode."""

    @property
    def num_actions(self) -> int:
        """Tokens that the policy wrote."""
        return int(self.action_mask.sum())

    @property
    def truncated(self) -> bool:
        """Whether the episode ended for want of room, not by a stop id."""
        return self.turns[-1].finish_reason == "length"
