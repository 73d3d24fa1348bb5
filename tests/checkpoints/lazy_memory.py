"""One process of test_lazy: what conversions leaf by leaf take of memory and time, printed as JSON.

Arguments: an empty folder, and VOCABULARY WIDTH LAYERS of a model whose state (weights and two moments) is converted.
"""

import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.lazy import LazyArray
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params

MB = 1 << 20


def resident(which: str) -> int:
    """Bytes that the process has ("VmRSS"), or has had at most since `forget_peak` ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def measured(what: Callable[[], object], num_bytes: int) -> dict[str, float]:
    """What it took: MB beyond those the process had, at the most, and MB/s of what it converted."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.monotonic()
    what()
    seconds = time.monotonic() - start
    taken = (resident("VmHWM") - before) / MB
    return {"base": before / MB, "taken": taken, "MB/s": num_bytes / MB / seconds}


def hf_config(vocabulary: int, width: int, layers: int) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width}
    heads = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {"model_type": "qwen2", "tie_word_embeddings": False, "torch_dtype": "float32", **sizes, **heads}


def lazy_state(params: Any) -> dict[str, Any]:
    def leaf(shape: jax.ShapeDtypeStruct) -> LazyArray:
        dtype = np.dtype(np.float32)
        return LazyArray(shape.shape, dtype, lambda: np.full(shape.shape, len(shape.shape), dtype))

    tree = jax.tree.map(leaf, params)
    step = LazyArray((), np.dtype(np.int32), lambda: np.asarray(3, np.int32))
    return {"params": tree, "optimizer": {"mu": tree, "nu": tree}, "step": step}


def num_bytes_of(tree: Any) -> int:
    return sum(leaf.dtype.itemsize * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def save(folder: Path, state: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state, {})
    checkpoints.close()


def read(folder: Path) -> None:
    checkpoints = Checkpoints(folder, read_only=True)
    for leaf in jax.tree.leaves(checkpoints.lazy(1)):
        leaf.load()
    checkpoints.close()


def save_sharded(folder: Path, state: Any) -> None:
    """As a run on two devices does: the columns of each matrix are in two chunks."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))

    def spread(leaf: LazyArray) -> jax.Array:
        spec = PartitionSpec(*[None] * (len(leaf.shape) - 1), "tensor") if leaf.shape else PartitionSpec()
        return jax.device_put(leaf.load(), NamedSharding(mesh, spec))

    save(folder, jax.tree.map(spread, state))


def main(folder: Path, *sizes: int) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)

    def model(*sizes: int) -> tuple[Any, Any, Any]:
        described = hf_config(*sizes)
        config = decoder_config(described)
        return described, config, lazy_state(abstract_params(config))

    def export_(described: Any, config: Any, state: Any) -> None:
        export(folder / "hf", state["params"], config=config, hf_config=described)

    # Threads, imports and caches: what any conversion takes.
    warm = model(16, 16, 2)
    save(folder / "warm", warm[2])
    read(folder / "warm")
    export_(*warm)
    described, config, state = model(*sizes)
    whole, params = num_bytes_of(state), num_bytes_of(state["params"])
    largest = max(map(num_bytes_of, jax.tree.leaves(state))) / MB
    facts: dict[str, Any] = {"largest": largest, "whole": whole / MB}
    facts["save"] = measured(lambda: save(folder / "whole", state), whole)
    facts["read"] = measured(lambda: read(folder / "whole"), whole)
    facts["export"] = measured(lambda: export_(described, config, state), params)
    facts["together"] = measured(lambda: jax.tree.map(lambda leaf: leaf.load(), state["params"]), params)
    save_sharded(folder / "sharded", {"params": state["params"]})
    facts["read_sharded"] = measured(lambda: read(folder / "sharded"), params)
    return facts


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:])), indent=2) + "\n")
