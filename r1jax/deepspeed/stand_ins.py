"""The names that checkpoints' pickles may have, and what stands for each; see `pickles.py`."""

from typing import Any

import ml_dtypes
import numpy as np

from r1jax.deepspeed.pickles import Global, Opaque, OrderedMapping, Refused, key
from r1jax.deepspeed.tensors import FileTensor, file_tensor, lengths

STORAGE_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
"""torch's classes of storage."""

_TORCH_DTYPES = (
    *("float32", "float", "float64", "double", "float16", "half", "bfloat16"),
    *("int64", "long", "int32", "int", "int16", "short", "int8", "uint8", "bool"),
)
# Looked at for what they hold, never needed: the scaler of fp16, and the places of parameters in a rank's slice (which
# are wrong under round_robin_gradients).
_CLASSES = (
    "torch.device",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def _tensor(*args: Any) -> FileTensor:
    if not 6 <= len(args) <= 7:
        raise Refused("a tensor of an unknown form")
    storage, offset, shape, strides = args[:4]
    return file_tensor(storage, offset, shape, strides)


def _parameter(*args: Any) -> FileTensor:
    if not 3 <= len(args) <= 4 or not isinstance(args[0], FileTensor):
        raise Refused("a parameter of an unknown form")
    return args[0]


_TENSOR = Global("torch._utils._rebuild_tensor_v2", _tensor)
_PARAMETER = Global("torch._utils._rebuild_parameter", _parameter)


def _with_attributes(*args: Any) -> FileTensor:
    """A tensor that carries attributes, such as DeepSpeed's ds_id; they are dropped."""
    maker, kind, inner = args[:3] if len(args) == 4 else (None, None, None)
    known = isinstance(kind, Global) and kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if maker not in (_TENSOR, _PARAMETER) or not known or not isinstance(inner, tuple):
        raise Refused("a tensor of an unknown class")
    return _tensor(*inner) if maker is _TENSOR else _parameter(*inner)


def _ordered(*args: Any) -> OrderedMapping:
    if args:
        raise Refused("an OrderedDict with arguments")
    return OrderedMapping()


def _size(*args: Any) -> tuple[int, ...]:
    return lengths(args[0] if len(args) == 1 else args)


def _integer(*args: Any) -> int:
    if len(args) != 1 or type(args[0]) is not int:
        raise Refused("an enumeration's member that is not an integer")
    return args[0]


def _set(*args: Any) -> set[Any]:
    if len(args) != 1 or not isinstance(args[0], list):
        raise Refused("a set that is not made of a list")
    return {key(member) for member in args[0]}


def _encode(*args: Any) -> bytes:
    """The bytes that protocol 2 writes as text in latin1."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        raise Refused("bytes that are not written as latin1")
    try:
        return args[0].encode("latin1")
    except UnicodeEncodeError as error:
        raise Refused("bytes that are not written as latin1") from error


def _opaque(name: str) -> Global:
    return Global(name, lambda *args: Opaque(name, args))


NAMES: dict[str, Global] = {
    stand_in.name: stand_in
    for stand_in in (
        Global("collections.OrderedDict", _ordered),
        Global("torch.Size", _size),
        _TENSOR,
        _PARAMETER,
        Global("torch._utils._rebuild_parameter_with_state", _parameter),
        Global("torch._tensor._rebuild_from_type_v2", _with_attributes),
        Global("torch.Tensor"),
        Global("torch.nn.parameter.Parameter"),
        Global("deepspeed.runtime.zero.config.ZeroStageEnum", _integer),
        Global("_codecs.encode", _encode),
        Global("builtins.set", _set),
        Global("__builtin__.set", _set),
        *(Global(f"torch.{name}", value=dtype) for name, dtype in STORAGE_DTYPES.items()),
        *(Global(f"torch.{name}") for name in _TORCH_DTYPES),
        *map(_opaque, _CLASSES),
    )
}
"""All that a pickle may name."""
