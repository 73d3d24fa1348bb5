"""A checkpoint's model_states files: which parameters there are, in which order, and how far the run was."""

import dataclasses
from typing import Any

from r1jax.config.errors import shown
from r1jax.deepspeed.content import count, get, names, of_kind, plain, shapes
from r1jax.deepspeed.folders import CheckpointFiles
from r1jax.deepspeed.pickles import Refused
from r1jax.deepspeed.tensors import FileTensor
from r1jax.deepspeed.torch_file import load, reading

WHAT = "a DeepSpeed model_states file"
_MERGED = "only ZeRO's data parallelism is read: merge it into a plain checkpoint with the tool that made it"
ONE_SAVE = "the files must be of one save: copy the whole folder again"
_FLOATS = ("float32", "bfloat16", "float16", "float64")
# What DeepSpeed itself writes; any other key came through client_state.
_OWN_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
    *("checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info"),
}
# Keys with state that we have nothing to put into, when they hold something.
_LEFT = ("data_sampler", "random_ltd")


@dataclasses.dataclass(frozen=True)
class ModelStates:
    """What the model_states files say, those of all ranks compared."""

    shapes: tuple[dict[str, tuple[int, ...]], ...]
    """Trained parameters by (sub-)group, each in the order of the flattening."""
    frozen: dict[str, tuple[int, ...]]
    frozen_values: tuple[dict[str, FileTensor], ...]
    """Of frozen parameters: whole ones of rank 0 up to stage 2, each rank's shards at stage 3."""
    tied: dict[str, str]
    """The holder's name for each other name of a shared parameter."""
    world_size: int
    """Zero where the files do not say it."""
    dtype: str
    """The model's dtype as numpy names it."""
    global_steps: int
    skipped_steps: int
    global_samples: int | None
    """None where the files do not say it."""
    scheduler: dict[str, Any] | None
    ds_config: dict[str, Any]
    not_carried: tuple[str, ...]


def read_model_states(files: CheckpointFiles) -> ModelStates:
    """The content of the files; raises `UserError` naming the file that is not read or differs from rank 0's."""
    with reading(files.model[0], WHAT):
        first = of_kind(load(files.model[0]), "content", dict)
        states = _parse(first, "bfloat16" if files.bf16 else None)
    fragments = [states.frozen_values[0]]
    for path in files.model[1:]:
        with reading(path, WHAT):
            other = of_kind(load(path), "content", dict)
            _refuse_other_save(first, other)
            fragments.append(_fragments(other, states.frozen))
    return dataclasses.replace(states, frozen_values=tuple(fragments))


def refuse_other_save(model: ModelStates, world_size: int, step: int) -> None:
    """Nothing; raises `Refused` when the optimizer's files, of which these are facts, are not of the model's save."""
    if model.world_size not in (0, world_size):
        raise Refused(f"dp_world_size {model.world_size} beside an optimizer of {world_size} ranks", ONE_SAVE)
    updates = model.global_steps - model.skipped_steps
    # Earlier releases of DeepSpeed let Adam make its state by a first step on zeros, which is counted.
    if step not in (updates, updates + 1):
        raise Refused(f"{updates} steps (without skipped ones) beside Adam's step {step}", ONE_SAVE)


def _parse(content: dict[Any, Any], dtype: str | None) -> ModelStates:
    _refuse_parallel(content)
    module = get(content, "module", dict)
    groups = _groups(content)
    tied = _tied(content)
    frozen = _frozen(content, module, {*tied, *names(content.get("buffer_names") or [], "buffer_names")}, groups)
    held = [name for group in (*groups, frozen) for name in group]
    if len(set(held)) != len(held) or set(held) & set(tied) or not set(tied.values()) <= set(held):
        raise Refused("a parameter in two places, or a shared one without its holder")
    if not any(groups):
        raise Refused("no trained parameters in param_shapes")
    scheduler = content.get("lr_scheduler")
    return ModelStates(
        shapes=groups,
        frozen=frozen,
        frozen_values=(_fragments(content, frozen),),
        tied=tied,
        world_size=count(content, "dp_world_size", 0),
        dtype=dtype or _dtype(module, set(held)),
        global_steps=count(content, "global_steps"),
        skipped_steps=count(content, "skipped_steps", 0),
        global_samples=count(content, "global_samples") if "global_samples" in content else None,
        scheduler=None if scheduler is None else plain(of_kind(scheduler, "lr_scheduler", dict), "lr_scheduler"),
        ds_config=plain(of_kind(content.get("ds_config") or {}, "ds_config", dict), "ds_config"),
        not_carried=_not_carried(content),
    )


def _refuse_parallel(content: dict[Any, Any]) -> None:
    """Raises where the files hold parts of tensors, layers or experts."""
    degrees = of_kind(content.get("checkpoint_parallel_dimensions") or {}, "checkpoint_parallel_dimensions", dict)
    sizes = {"mp_world_size": count(content, "mp_world_size", 1)}
    sizes.update({key: count(degrees, key, 1) for key in ("pp_degree", "tp_degree")})
    for key, size in sizes.items():
        if size > 1:
            raise Refused(f"{key} {size} (tensor or pipeline parallelism)", _MERGED)
    if content.get("ds_autoep_layers") or content.get("autoep_layers"):
        raise Refused("expert parallelism", _MERGED)


def _groups(content: dict[Any, Any]) -> tuple[dict[str, tuple[int, ...]], ...]:
    groups: list[dict[str, tuple[int, ...]]] = []
    held: set[str] = set()
    for group in get(content, "param_shapes", list):
        groups.append(shapes(group, "param_shapes"))
        # Looked for in each group, for one of many names may stand in the list a thousand times.
        if not held.isdisjoint(groups[-1]):
            raise Refused("a parameter in two groups of param_shapes")
        held.update(groups[-1])
    return tuple(groups)


def _tied(content: dict[Any, Any]) -> dict[str, str]:
    shared = of_kind(content.get("shared_params") or {}, "shared_params", dict)
    names(shared, "shared_params")
    names(list(shared.values()), "shared_params")
    return dict(shared)


def _frozen(
    content: dict[Any, Any], module: dict[Any, Any], others: set[str], groups: tuple[dict[str, tuple[int, ...]], ...]
) -> dict[str, tuple[int, ...]]:
    """The frozen parameters' shapes; stage 1 names them nowhere, so they are what else there is in the module."""
    listed = content.get("frozen_param_shapes")
    if listed is not None:
        return shapes(listed, "frozen_param_shapes")
    known = others.union(*groups)
    rest = {name: value for name, value in module.items() if name not in known}
    names(rest, "module")
    return {name: value.shape for name, value in rest.items() if isinstance(value, FileTensor) and value.numel}


def _fragments(content: dict[Any, Any], frozen: dict[str, tuple[int, ...]]) -> dict[str, FileTensor]:
    fragments = content.get("frozen_param_fragments")
    if fragments is None:
        fragments = get(content, "module", dict)
    values = {}
    for name in frozen:
        value = of_kind(
            of_kind(fragments, "frozen_param_fragments", dict).get(name), f"frozen {shown(name)}", FileTensor
        )
        if value.dtype.name not in _FLOATS or not value.contiguous:
            raise Refused(f"a frozen parameter {shown(name)} in {value.dtype.name} or with strides")
        values[name] = value
    return values


def _dtype(module: dict[Any, Any], held: set[str]) -> str:
    """The dtype of the trained parameters; stage 3 keeps empty tensors, which have it too."""
    dtypes = {value.dtype.name for name, value in module.items() if name in held and isinstance(value, FileTensor)}
    found = sorted(dtypes & set(_FLOATS))
    if not found:
        raise Refused("a module without its parameters")
    # Some kept in float32 (a router, norms) beside a model in half precision.
    return next((dtype for dtype in found if dtype in ("bfloat16", "float16")), found[0])


def _refuse_other_save(first: dict[Any, Any], other: dict[Any, Any]) -> None:
    for key in ("global_steps", "skipped_steps", "dp_world_size"):
        ours, theirs = count(first, key, 0), count(other, key, 0)
        if ours != theirs:
            raise Refused(f"{key} {theirs}, which is {ours} in rank 0's", ONE_SAVE)
    ours, theirs = ([list(group.items()) for group in _groups(content)] for content in (first, other))
    if ours != theirs:
        raise Refused("other param_shapes than rank 0's", ONE_SAVE)


def _not_carried(content: dict[Any, Any]) -> tuple[str, ...]:
    buffers = names(content.get("buffer_names") or [], "buffer_names")
    left = [f"{key} (model_states)" for key in _LEFT if content.get(key) is not None]
    left += [f"buffer {shown(name)}" for name in buffers[:3]] + ["more buffers"] * (len(buffers) > 3)
    client = sorted(key for key in content if isinstance(key, str) and key not in _OWN_KEYS)
    return (*left, *(f"client_state {shown(key)}" for key in client[:20]))
