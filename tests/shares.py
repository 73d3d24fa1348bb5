"""One process of test_processes: starts as sft.run does and writes down its share. Arguments: CONFIG FOLDER."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from r1jax import sft
from r1jax.checkpoints.hf import load_from
from r1jax.checkpoints.tensor_files import TensorFiles
from r1jax.config import load
from r1jax.objectives.reductions import token_mean
from r1jax.sharding.mesh import data_shards, make_mesh
from r1jax.sharding.placement import local_rows
from r1jax.sharding.processes import initialize_processes
from r1jax.training.source import read_source
from r1jax.training.state import lay_out, start_state


def resident(tree: object) -> int:
    """Bytes of the arrays that lie on this process's devices."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)


def share_of(config_file: Path) -> dict[str, Any]:
    """This process's part of a run: bytes of weights that it reads, of what lies on its devices, and rows."""
    config = load(["--config", str(config_file)]).config
    source, mesh = read_source(config), make_mesh(config.mesh)
    layout = lay_out(source.decoder, config.optimizer, mesh, config.mesh.zero_stage)
    with TensorFiles(source.directory) as files:
        params = load_from(files, source.decoder, layout.shardings.params)
        read = files.bytes_read
    state = start_state(params, config.optimizer, layout)
    train, _ = sft.tokenise_splits(config, source, sft.load_splits(config), data_shards(mesh))
    (_, batch), *_ = sft.device_batches(train, layout, token_mean, 0)
    return {
        "read": read,
        "params": resident(state.params),
        "optimizer": resident(state.optimizer),
        "rows": local_rows(layout.batch, train.plan.rows_per_micro_batch),
        "batch": resident(batch.tokens) / batch.tokens.nbytes,
    }


def main(config_file: Path, folder: Path) -> None:
    initialize_processes()
    (folder / f"share.{jax.process_index()}").write_text(json.dumps(share_of(config_file)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
