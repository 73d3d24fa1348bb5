"""Small files that would take much memory to read or to write again, each judged:
`python -m tests.deepspeed.hoards FOLDER`.
"""

import json
import pickle
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from r1jax.config.errors import UserError
from r1jax.deepspeed.checkpoint import open_checkpoint
from r1jax.deepspeed.checkpoint_state import state_of, target_of
from r1jax.deepspeed.folders import CheckpointFiles
from r1jax.deepspeed.model_states import read_model_states
from r1jax.deepspeed.optimizer_states import read_rank
from r1jax.deepspeed.pickles import MAX_STEPS
from r1jax.deepspeed.training_state import Target
from r1jax.deepspeed.writer import write_checkpoint
from tests.deepspeed.limits import Judge
from tests.deepspeed.pickled import call, integer, parse, read_members, text, write_members
from tests.deepspeed.replaced_files import clear, replace
from tests.deepspeed.sources import HEAD, make_source

# As much as a pickle may take by what pickles.py says of itself, and somewhat more.
_MORE_BYTES = 640 << 20
_SECONDS = 120

# Stands in a checkpoint's ds_config, for something else to be put in its place.
MARK = 12345
HOLDER = "model.embed_tokens.weight"


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


def whole_hoards() -> Iterator[tuple[str, bool, int | str, bytes]]:
    """What stands in a checkpoint that is whole: a name, whether it is read and written again, and what it takes the
    place of (see `put`)."""

    def copies(size: int, count: int) -> bytes:
        return b"](" + text("x" * size) + b"q\x00" + b"h\x00" * count + b"e"

    yield "a text again and again", False, MARK, copies(8 << 20, 900_000)
    yield "a text some times", True, MARK, copies(2 << 20, 6)
    keys = b"](" + text("x" * (8 << 20)) + b"q\x000" + b"}h\x00Ns" * 300_000 + b"e"
    yield "a key again and again", False, MARK, keys
    yield "a list of many", True, MARK, b"](" + b"K\x07" * 1000 + b"eq\x000(" + b"h\x00" * 990 + b"t"
    aliases = b"".join(text(f"a{index}") + b"h\x00" for index in range(1_000_000))
    yield "a parameter of many names", False, HEAD, text("a") + text(HOLDER) + b"q\x00" + aliases + text(HEAD)


def put(path: Path, old: int | str, new: bytes) -> None:
    """The operations in the place of the last that pushes this number or text."""
    (name, pickled), *members = read_members(path)
    operations = parse(pickled)
    place = max(index for index, operation in enumerate(operations) if operation.argument == old)
    before, after = operations[:place], operations[place + 1 :]
    pickled = b"".join([*(each.data for each in before), new, *(each.data for each in after)])
    write_members(path, [(name, pickled), *members])


def read_and_write(folder: Path, into: Path) -> None:
    """What is kept of the checkpoint as JSON, and the checkpoint written again."""
    opened = open_checkpoint(folder)
    json.dumps(opened.as_json())
    for universal in (False, True):
        write_checkpoint(into, state_of(opened), target_of(opened), universal=universal)


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
    into = folder / "into"
    target = Target(stage=2, world_size=1, dtype="fp32", ds_config={"marker": MARK})
    whole = write_checkpoint(folder / "whole", make_source(tied=True), target)
    judge = Judge(folder, into=into, more_bytes=_MORE_BYTES, seconds=_SECONDS)
    path = folder / "states.pt"
    failed = 0
    for name, pickled in hoards():
        write_members(path, [("hoard/data.pkl", pickled)])
        refusal, wrong = judge(lambda: read(path))
        failed += refusal is None or wrong is not None
        sys.stdout.write(f"{name} -> {wrong or refusal}\n")
    model = whole / "mp_rank_00_model_states.pt"
    sound = model.read_bytes()
    for name, is_read, old, new in whole_hoards():
        put(model, old, new)
        into.mkdir()
        refusal, wrong = judge(lambda: read_and_write(whole, into))
        failed += (refusal is None) != is_read or wrong is not None
        sys.stdout.write(f"{name} -> {wrong or refusal or 'read and written'}\n")
        clear(into)
        replace(model, sound)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
