"""One of two processes of test_engine: samples its half of the prompts on its own devices. Arguments: DIR RANK."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from test_engine import KINDS, PROMPTS, SETTINGS, sharded

from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.models.config import DecoderConfig
from r1jax.rollout.engine import EmbeddedEngine
from r1jax.sharding.mesh import make_mesh


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


def main(folder: Path, rank: int) -> None:
    jax.distributed.initialize(coordinator(folder, rank), num_processes=2, process_id=rank)
    config = DecoderConfig(**json.loads((folder / "config.json").read_text()))
    found = {}
    for name, (shape, stage) in KINDS.items():
        mesh = make_mesh(MeshConfig(**shape))
        engine = EmbeddedEngine(config, mesh, SETTINGS)
        engine.sync(sharded(config, mesh, stage), 5)
        # Different numbers of prompts and of tokens: nobody waits for the other between two syncs.
        mine = range(rank, len(PROMPTS), 2) if rank == 0 else range(1, 2)
        groups = engine.generate([PROMPTS[i] for i in mine], list(mine), num_generations=3, step=2)
        found[name] = {i: [one.tokens.tolist() for one in group] for i, group in zip(mine, groups, strict=True)}
        assert all(len(leaf.devices()) == 2 for leaf in jax.tree.leaves(engine._params))
    (folder / f"found.{rank}").write_text(json.dumps(found))
    try:
        EmbeddedEngine(config, make_mesh(MeshConfig(mesh_fsdp=1, mesh_tensor=4)), SETTINGS)
    except UserError as error:
        (folder / f"refused.{rank}").write_text(str(error))
    multihost_utils.sync_global_devices("done")
    np.testing.assert_equal(jax.process_count(), 2)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
