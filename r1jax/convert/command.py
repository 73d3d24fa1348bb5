"""Turns a model, or a whole training state, from one format into another.

    python -m r1jax.convert SRC DST --to hf|orbax|peft|deepspeed [--model_name_or_path DIR]
                            [--dtype float32|bfloat16|float16]
                            [--zero_stage 1|2|3 --world_size W --layout trainer|engine|universal]

SRC is a Hugging Face directory or hub id, a run's output_dir, its checkpoints/ or one checkpoints/STEP, or a DeepSpeed
checkpoint: the folder that save_checkpoint got, one tag in it, or a Trainer's output_dir or checkpoint-N. A directory
that is both a model and checkpoints, as a finished run's is, counts as what DST is not; one with a run's checkpoints
and DeepSpeed's counts as the run, except to orbax. To orbax, DST/checkpoints/STEP
holds what a run would save; to hf, DST holds what a run exports; to deepspeed, DST holds a checkpoint that an engine of
that stage and world size loads. An adapter (LoRA) is merged into its model, which its folder or its run names
(--model_name_or_path where that is elsewhere now); to peft, DST holds the adapter of a run's checkpoint. Runs on the
CPU in one process, and a training state passes through memory parameter by parameter.
"""

import argparse
import contextlib
import sys
from collections.abc import Generator
from pathlib import Path

import jax

from r1jax import commands
from r1jax.checkpoints import peft
from r1jax.checkpoints.hf_export import EXPORT_DTYPES
from r1jax.checkpoints.orbax import locate
from r1jax.config.errors import need, renamed
from r1jax.config.folders import check_folder, writing
from r1jax.convert.deepspeed import LAYOUTS, from_one_to_another, to_deepspeed
from r1jax.convert.model import Model
from r1jax.convert.report import Report
from r1jax.convert.sources import from_deepspeed, from_hf, from_orbax
from r1jax.convert.targets import to_hf, to_orbax, to_peft
from r1jax.training.deepspeed import names_deepspeed


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when DST is complete."""
    # Nothing is computed: an accelerator would only be taken from somebody, and may be too small for the model.
    jax.config.update("jax_platforms", "cpu")
    return commands.run(_convert, sys.argv[1:] if argv is None else argv)


def _convert(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    source, target = Path(args.source), Path(args.target)
    with renamed("checkpoint", "SRC"):
        is_deepspeed = names_deepspeed(source)
    found = locate(source)
    # As in resume_from_checkpoint, a run's own come before those that it went on from.
    is_deepspeed = is_deepspeed and (found is None or args.to == "orbax")
    is_hf = (
        not is_deepspeed and source.is_dir() and any((source / n).is_file() for n in ("config.json", peft.CONFIG_FILE))
    )
    found = None if is_deepspeed else found
    if source.is_dir() and not (is_hf or is_deepspeed or found):
        got = f"{source}, which has neither config.json nor checkpoints"
        raise need("SRC", "a Hugging Face model, a run or a DeepSpeed checkpoint", got, "check the path")
    check_folder("DST", args.target)
    _check_target(args, target, is_hf=is_hf, is_run=found is not None, is_deepspeed=is_deepspeed)
    report = Report()
    with contextlib.ExitStack() as stack:
        stack.callback(report.stop)
        stack.enter_context(_unmade(target.absolute()))
        stack.enter_context(writing("DST", target, "nothing is left there: make room or mend it and convert again"))
        stack.enter_context(renamed("checkpoint", "SRC"))
        stack.enter_context(renamed("output", "DST"))
        stack.enter_context(renamed("output_dir", "DST"))
        if is_deepspeed and args.to == "deepspeed":
            line = from_one_to_another(source, target, args, report)
        else:
            if is_deepspeed:
                model = from_deepspeed(args)
                report.source(model, args.to)
            elif found and args.to != "orbax":
                model = from_orbax(*found, args, stack)
            else:
                model = from_hf(args)
            line = f"{model.origin} -> {_write(target, report.counted(model), args, report)}"
    report.print(line)
    return 0


@contextlib.contextmanager
def _unmade(target: Path) -> Generator[None]:
    """Where what is within it fails, the folders that were made for the target go again, if nothing is in them."""
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        yield
    finally:
        # What has succeeded has left something there, and is not touched.
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_target(args: argparse.Namespace, target: Path, *, is_hf: bool, is_run: bool, is_deepspeed: bool) -> None:
    """Nothing; raises `UserError` where the command asks for what does not go together."""
    if args.to == "orbax":
        if args.dtype is not None:
            raise need("dtype", "no value with --to orbax", args.dtype, "master weights are float32")
        if is_run and not is_hf:
            raise need("SRC", "a Hugging Face model for --to orbax", f"the checkpoints {args.source}", "choose --to hf")
        if locate(target):
            raise need("DST", "a directory without checkpoints", str(target), "name another, or remove them first")
    if args.to == "peft" and (not is_run or args.dtype is not None):
        got = args.source if not is_run else f"--dtype {args.dtype}"
        raise need("SRC", "a run with an adapter, and no --dtype, for --to peft", got, "adapters are float32")
    if args.to == "deepspeed":
        if not (is_run or is_deepspeed):
            rule = "a run's checkpoint or DeepSpeed's for --to deepspeed"
            raise need("SRC", rule, f"the model {args.source}", "a model alone has no moments to go on from")
        if args.dtype == "float16":
            raise need("dtype", "float32 or bfloat16 with --to deepspeed", args.dtype, "choose one of these")
        return
    for name in ("zero_stage", "world_size", "layout"):
        if getattr(args, name) is not None:
            raise need(name, f"no value with --to {args.to}", str(getattr(args, name)), "it is for --to deepspeed")


def _write(target: Path, model: Model, args: argparse.Namespace, report: Report) -> str:
    """Writes the model; what was written, for the last line."""
    if args.to == "hf":
        return to_hf(target, model, args.dtype)
    if args.to == "orbax":
        return to_orbax(target, model)
    if args.to == "peft":
        return to_peft(target, model)
    return to_deepspeed(target, model, args, report)


def _parser() -> argparse.ArgumentParser:
    about = "Turns a model or a training state from one format into another."
    parser = commands.ArgumentParser("python -m r1jax.convert", about)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="Hugging Face directory or hub id, run, checkpoints/ or a step, DeepSpeed's folder",
    )
    parser.add_argument("target", metavar="DST", help="directory that gets the model")
    parser.add_argument("--to", required=True, choices=["hf", "orbax", "peft", "deepspeed"], help="format of DST")
    parser.add_argument(
        "--model_name_or_path", help="gives what SRC has not: config.json, tokenizer, an adapter's model"
    )
    parser.add_argument(
        "--dtype", choices=EXPORT_DTYPES, help="of the weights with --to hf and deepspeed; else the source model's"
    )
    deepspeed = "with --to deepspeed; else the source checkpoint's"
    parser.add_argument(
        "--zero_stage", type=int, choices=[1, 2, 3], help=f"of the engine that will load it, {deepspeed}"
    )
    parser.add_argument("--world_size", type=int, help=f"its number of processes, {deepspeed}")
    parser.add_argument(
        "--layout", choices=LAYOUTS, help=f"transformers' checkpoint-N, load_checkpoint's, or universal, {deepspeed}"
    )
    return parser
