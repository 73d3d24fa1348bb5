"""What generations hand on, as a checkpoint holds it: arrays that every process has whole, and a description.

The host's numbers are float64, which devices do not keep, so arrays go as the 32-bit words that they are made of.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.batch import Rollout, Turn, VersionSpan
from r1jax.experience.groups import Group
from r1jax.experience.replay import Buffer, Stored
from r1jax.experience.selection import Carried

logger = logging.getLogger(__name__)

NAME = "selection"
"""Of the tree and of the metadata in a checkpoint."""
_PER_TOKEN = {"tokens": np.int32, "action_mask": np.int32, "logprobs": np.float32, "policy_logprobs": np.float32}
_PER_GROUP = ("values", "rewards", "advantages")


def stored(
    carried: Carried, reward_names: Sequence[str], sharding: NamedSharding
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trees, metadata); nothing where nothing is handed on."""
    arrays = {} if carried.rates is None else {"rates": carried.rates}
    arrays |= _arrays(carried.buffer)
    if not arrays:
        return {}, {}
    about = {
        "arrays": {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in arrays.items()},
        "reward_names": list(reward_names),
        "groups": [_about(one) for one in carried.buffer],
    }
    return {NAME: {name: _on_devices(array, sharding) for name, array in arrays.items()}}, {NAME: about}


def abstract(metadata: Mapping[str, Any], sharding: NamedSharding) -> dict[str, Any]:
    """The trees that go with a checkpoint's metadata, as shapes on this run's devices."""
    arrays = metadata[NAME]["arrays"] if NAME in metadata else {}
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    shapes = {name: jax.ShapeDtypeStruct((_words(about),), np.uint32, sharding=whole) for name, about in arrays.items()}
    return {NAME: shapes} if shapes else {}


def restored(
    trees: Mapping[str, Any], metadata: Mapping[str, Any], start: Carried, reward_names: Sequence[str], size: int
) -> Carried:
    """What the checkpoint has of what the run wants: `start` is what it would begin with, size that of its buffer."""
    if NAME not in metadata:
        return start
    about = metadata[NAME]
    found = {
        name: np.asarray(trees[NAME][name]).view(of["dtype"]).reshape(of["shape"])
        for name, of in about["arrays"].items()
    }
    rates = start.rates if start.rates is None else found.get("rates", start.rates)
    if size and about["groups"] and about["reward_names"] != list(reward_names):
        logger.warning("replay_buffer_size: the checkpoint's groups had other rewards; the buffer begins empty")
        size = 0
    return Carried(rates=rates, buffer=_buffer(found, about["groups"])[:size])


def _arrays(buffer: Buffer) -> dict[str, np.ndarray]:
    """All tokens, one completion after the other, and the numbers of the groups."""
    if not buffer:
        return {}
    rollouts = [rollout for one in buffer for rollout in one.group.rollouts]
    per_token = {name: np.concatenate([getattr(rollout, name) for rollout in rollouts]) for name in _PER_TOKEN}
    per_group = {name: np.stack([getattr(one.group, name) for one in buffer]) for name in _PER_GROUP}
    assert all(per_token[name].dtype == dtype for name, dtype in _PER_TOKEN.items())
    return {**per_token, **per_group, "scores": np.asarray([one.score for one in buffer])}


def _about(one: Stored) -> dict[str, Any]:
    # What an environment kept is not needed any more: the rewards are there.
    return {
        "generation": one.generation,
        "rollouts": [
            {
                "prompt_id": rollout.prompt_id,
                "sample": rollout.sample,
                "length": len(rollout.tokens),
                "versions": [list(span) for span in rollout.versions],
                "turns": [list(turn) for turn in rollout.turns],
            }
            for rollout in one.group.rollouts
        ],
    }


def _buffer(found: Mapping[str, np.ndarray], groups: Sequence[Mapping[str, Any]]) -> Buffer:
    made: list[Stored] = []
    start = 0
    for at, about in enumerate(groups):
        rollouts: list[Rollout] = []
        for rollout in about["rollouts"]:
            span = slice(start, start + rollout["length"])
            start = span.stop
            rollouts.append(
                Rollout(
                    prompt_id=rollout["prompt_id"],
                    sample=rollout["sample"],
                    tokens=found["tokens"][span],
                    action_mask=found["action_mask"][span],
                    logprobs=found["logprobs"][span],
                    policy_logprobs=found["policy_logprobs"][span],
                    versions=tuple(VersionSpan(*each) for each in rollout["versions"]),
                    turns=tuple(Turn(*each) for each in rollout["turns"]),
                )
            )
        group = Group(rollouts=tuple(rollouts), **{name: found[name][at] for name in _PER_GROUP})
        made.append(Stored(group=group, score=float(found["scores"][at]), generation=about["generation"]))
    return tuple(made)


def _on_devices(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.make_array_from_callback(words.shape, whole, lambda index: words[index])


def _words(about: Mapping[str, Any]) -> int:
    return int(np.prod(about["shape"])) * np.dtype(about["dtype"]).itemsize // 4
