"""From nothing to a trained and exported model on a CPU, through the real commands.

    python -m r1jax.quickstart [--output_dir outputs/quickstart] [--seed 0] [--num_problems 200] [--key value ...]

Makes a task, a tokenizer and a small random Qwen3 model, measures it on held-out problems, fine-tunes it with
configs/quickstart/sft.yaml and measures it again. Other keys go to that recipe, as in `--learning_rate 1e-3`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax

from r1jax import commands, generate, train
from r1jax.config.errors import at_least, need, require
from r1jax.quickstart import story

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "quickstart" / "sft.yaml"
NUM_TRAIN = 20_000
"""Training problems; the recipe says how many of them it sees."""


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when the model is trained, measured and exported."""
    return commands.run(_quickstart, sys.argv[1:] if argv is None else argv)


def _quickstart(argv: list[str]) -> int:
    started = time.perf_counter()
    args, recipe_keys = _parser().parse_known_args(argv)
    _check(args)
    if not os.environ.get("JAX_PLATFORMS"):
        # The recipe is made for one CPU device: several accelerators would multiply its batch.
        jax.config.update("jax_platforms", "cpu")
    generate.configure_jax("float32")
    # Imported here: transformers takes seconds, which a usage error should not wait for.
    from r1jax.quickstart.base_model import write_base_model
    from r1jax.quickstart.measure import measure
    from r1jax.quickstart.problems import held_out_problems, write_dataset

    console = story.make_console()
    folder, seed = Path(args.output_dir), args.seed
    base, data, trained = folder / "base", folder / "data", folder / "sft"
    command = _train_command(base, data, trained, seed, recipe_keys)
    problems = held_out_problems(args.num_problems)

    story.open_with(console, folder)
    story.stage(console, 1, "a model that knows nothing, and something to learn")
    num_weights = write_base_model(base, seed)
    write_dataset(data, num_train=NUM_TRAIN, num_test=args.num_problems, seed=seed)
    story.tell_material(console, problems[0], base, data, num_weights=num_weights, num_train=NUM_TRAIN)
    story.stage(console, 2, "what it can do before training")
    before = measure(base, problems, seed)
    story.tell_measurement(console, before, len(problems))
    story.stage(console, 3, "supervised fine-tuning")
    story.tell_command(console, ["python", "-m", "r1jax.train", *command])
    if code := train.main(command):
        return code
    story.stage(console, 4, "what it can do now")
    after = measure(trained, problems, seed)
    story.tell_measurement(console, after, len(problems))
    story.tell_styles(console, problems, after)
    story.show_answers(console, problems, before, after)
    seconds = time.perf_counter() - started
    summary = {
        "accuracy_base": before.accuracy,
        "accuracy_sft": after.accuracy,
        "standard_error_sft": after.standard_error,
        "num_problems": len(problems),
        "num_weights": num_weights,
        "seed": seed,
        "seconds": round(seconds, 1),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    story.close_with(console, folder, before, after, seconds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser("python -m r1jax.quickstart", "Trains the built-in example on this machine's CPU.")
    parser.add_argument("--output_dir", default="outputs/quickstart", help="gets all files (outputs/quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the training problems and their order (0)")
    parser.add_argument("--num_problems", type=int, default=200, help="held-out problems to measure on (200)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for what would fail later."""
    require(0 <= args.seed < 2**32, "seed", "0 <= x < 2**32", args.seed, "choose a number in that range")
    at_least("num_problems", args.num_problems, 1, "200 is the default")
    folder = Path(args.output_dir)
    require(not folder.exists() or folder.is_dir(), "output_dir", "a folder", args.output_dir, "name another")
    if not RECIPE.is_file():
        raise need("quickstart", f"the recipe {RECIPE}", "an installation without it", "run it from a checkout")


def _train_command(base: Path, data: Path, trained: Path, seed: int, recipe_keys: list[str]) -> list[str]:
    """The arguments of r1jax.train, the recipe's own where they are the same; an earlier run is replaced."""
    recipe = RECIPE.relative_to(Path.cwd()) if RECIPE.is_relative_to(Path.cwd()) else RECIPE
    keys = {"model_name_or_path": base, "dataset_name": data, "output_dir": trained, "seed": seed}
    given = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    afresh = ["--resume_from_checkpoint", "false", "--overwrite_output_dir", "true"]
    return ["--config", str(recipe), *given, *afresh, *recipe_keys]


if __name__ == "__main__":
    sys.exit(main())
