"""One of two processes of test_hf_export: HF -> sharded arrays -> Orbax -> restored -> HF. Arguments: SRC DIR RANK."""

import sys
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax.checkpoints.hf import load_from, read_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.checkpoints.tensor_files import TensorFiles
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params


def coordinator(folder: Path, rank: int) -> str:
    """The address on which rank 0 will listen; it picks a free port and leaves it in a file for the other."""
    import socket

    file = folder / "port"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            (folder / "port.part").write_text(str(probe.getsockname()[1]))
        (folder / "port.part").rename(file)
    while not file.exists():
        time.sleep(0.05)
    return f"127.0.0.1:{file.read_text()}"


def main(source: Path, folder: Path, rank: int) -> None:
    jax.distributed.initialize(coordinator(folder, rank), num_processes=2, process_id=rank)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    hf_config = read_config(source)
    config = decoder_config(hf_config)
    spread = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    abstract = abstract_params(config)
    shardings = jax.tree.map(lambda leaf: spread if leaf.shape[1:] and leaf.shape[1] % 4 == 0 else whole, abstract)
    with TensorFiles(source) as files:
        params = load_from(files, config, shardings)
        (folder / f"bytes_read.{rank}").write_text(str(files.bytes_read))
    state = {"params": params, "step": jax.device_put(jax.numpy.int32(1), whole)}
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (1, 2, 3):
        assert checkpoints.save(step, state, {"hf_config": hf_config})
    checkpoints.wait()
    checkpoints.discard_after(2)
    assert checkpoints.all_steps() == [1, 2]
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored, metadata = checkpoints.restore(2, target)
    checkpoints.close()
    assert metadata["hf_config"] == hf_config
    export(folder / "out", restored["params"], config=config, hf_config=hf_config, max_shard_bytes=8_000)
    # Nobody returns from an export before it is there.
    assert (folder / "out" / "config.json").exists()
    multihost_utils.sync_global_devices("done")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
