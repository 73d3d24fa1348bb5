"""Small files that would take much memory, each judged: `python -m tests.deepspeed.hoards FOLDER`."""

import pickle
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from r1jax.config.errors import UserError
from r1jax.deepspeed.folders import CheckpointFiles
from r1jax.deepspeed.model_states import read_model_states
from r1jax.deepspeed.optimizer_states import read_rank
from r1jax.deepspeed.pickles import MAX_STEPS
from tests.deepspeed.limits import Judge
from tests.deepspeed.pickled import call, integer, text, write_members

# As much as a pickle may take by what pickles.py says of itself, and somewhat more.
_MORE_BYTES = 640 << 20
_SECONDS = 120


def hoards() -> Iterator[tuple[str, bytes]]:
    """The pickles, with a name for each."""
    begin = b"\x80\x02"
    yield "lists", begin + b"]" * MAX_STEPS + b"."
    yield "sets", begin + b"\x8f" * (MAX_STEPS - 2) + b"."
    # The text, kept in place 0, is made into bytes again and again; the bytes stay on the stack.
    copy = b"c_codecs\nencode\n" + b"h\x00" + text("latin1") + b"\x86R"
    yield "copies of a text", begin + text("x" * (1 << 20)) + b"q\x00" + copy * 10_000 + b"."
    members = b"](" + b"K\x01" * 100_000 + b"eq\x00"
    yield "copies of a set", begin + members + (b"cbuiltins\nset\nh\x00\x85R") * 2_000 + b"."
    yield "a text of terabytes", begin + b"\x8d" + struct.pack("<Q", 1 << 42) + b"x."
    yield "an integer of megabytes", begin + b"\x8b" + struct.pack("<i", 1 << 23) + bytes(1 << 23) + b"."
    yield "a pickle of many bytes", begin + b"N0" * (1 << 23) + b"."
    yield "a tensor of a few bytes' storage", begin + call("torch.storage", "UntypedStorage", integer(1 << 50)) + b"."
    arguments = b"(" + b"N" * 100_000 + b"tq\x00"
    scaler = b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n"
    yield "copies of arguments", begin + arguments + (scaler + b"h\x00R") * 20_000 + b"."
    shared = [0] * 400_000
    groups = [{"params": [index], "lr": shared} for index in range(5_000)]
    adam = {"state": {}, "param_groups": groups}
    state = {"zero_stage": 2, "single_partition_of_fp32_groups": [], "base_optimizer_state": adam}
    yield "groups that share what is large", pickle.dumps({"optimizer_state_dict": state}, protocol=2)
    shapes = {f"{index}.weight": (1,) for index in range(100_000)}
    yield "groups that are one", pickle.dumps({"module": {}, "param_shapes": [shapes] * 5_000}, protocol=2)


def read(path: Path) -> None:
    """Reads the file as the one and as the other kind."""
    try:
        read_model_states(CheckpointFiles(path.parent, None, (path,), (), False))
    except UserError as error:
        if "no module" not in str(error):
            raise
    read_rank(path)


def main(folder: Path) -> int:
    """Writes the judgement of each; 1 where one of them was not refused in order."""
    judge = Judge(folder, more_bytes=_MORE_BYTES, seconds=_SECONDS)
    path = folder / "states.pt"
    failed = 0
    for name, pickled in hoards():
        write_members(path, [("hoard/data.pkl", pickled)])
        refusal, wrong = judge(lambda: read(path))
        failed += refusal is None or wrong is not None
        sys.stdout.write(f"{name} -> {wrong or refusal}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
