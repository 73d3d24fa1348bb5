"""From nothing to a trained and exported model on a CPU, through the real commands.

    python -m r1jax.quickstart [--output_dir outputs/quickstart] [--seed 0] [--num_problems 200] [--key value ...]

Makes a task, a tokenizer and a small random Qwen3 model, measures it on held-out problems, fine-tunes it with
configs/quickstart/sft.yaml and measures it again. Other keys go to that recipe, as in `--learning_rate 1e-3`.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax

from r1jax import commands, config, runtime, train
from r1jax.config.errors import need, require
from r1jax.quickstart import story
from r1jax.quickstart.measure import NUM_SAMPLES, Measurement, measure
from r1jax.quickstart.problems import held_out_problems, write_dataset

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "quickstart" / "sft.yaml"
NUM_TRAIN = 24_000
"""Training problems: one epoch of the recipe."""
MAX_PROBLEMS = 10_000
"""About 30,000 problems are held out."""


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when the model is trained, measured and exported."""
    return commands.run(_quickstart, sys.argv[1:] if argv is None else argv)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do and where."""

    folder: Path
    seed: int
    num_problems: int
    """Held-out problems to measure on."""
    recipe_keys: tuple[str, ...]
    """Options for the recipe."""

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def trained(self) -> Path:
        return self.folder / "sft"

    @property
    def train_options(self) -> list[str]:
        """The options of r1jax.train; an earlier run is replaced."""
        recipe = RECIPE.relative_to(Path.cwd()) if RECIPE.is_relative_to(Path.cwd()) else RECIPE
        keys = {
            "config": recipe,
            "model_name_or_path": self.base,
            "dataset_name": self.data,
            "output_dir": self.trained,
            "seed": self.seed,
            "resume_from_checkpoint": "false",
            "overwrite_output_dir": "true",
        }
        return [part for key, value in keys.items() for part in (f"--{key}", str(value))] + list(self.recipe_keys)


def _quickstart(argv: list[str]) -> int:
    started = time.perf_counter()
    args, recipe_keys = _parser().parse_known_args(argv)
    _check(args)
    plan = Plan(
        folder=Path(args.output_dir), seed=args.seed, num_problems=args.num_problems, recipe_keys=tuple(recipe_keys)
    )
    # A wrong key must not wait for the training to be found.
    if config.load(plan.train_options).dry_run:
        return train.main(plan.train_options)
    if not os.environ.get("JAX_PLATFORMS"):
        # The recipe is made for one CPU device: several accelerators would multiply its batch.
        jax.config.update("jax_platforms", "cpu")
    runtime.configure("float32")
    return _run(plan, started)


def _run(plan: Plan, started: float) -> int:
    """The exit code of the whole, told as it goes."""
    # Imported here: transformers takes seconds, which a usage error should not wait for.
    from r1jax.quickstart.base_model import write_base_model

    console = story.make_console()
    problems = held_out_problems(plan.num_problems)
    story.open_with(console, plan.folder)
    story.stage(console, 1, "a model that knows nothing, and something to learn")
    num_weights = write_base_model(plan.base, plan.seed)
    write_dataset(plan.data, num_train=NUM_TRAIN, num_test=plan.num_problems, seed=plan.seed)
    story.tell_material(console, problems[0], plan.base, plan.data, num_weights=num_weights, num_train=NUM_TRAIN)
    story.stage(console, 2, "what it can do before training")
    before = measure(plan.base, problems, plan.seed)
    story.tell_measurement(console, before, len(problems))
    story.stage(console, 3, "supervised fine-tuning")
    story.tell_command(console, ["python", "-m", "r1jax.train", *plan.train_options])
    # An earlier run's model must not pass for this one's, should the training be stopped.
    (plan.trained / "config.json").unlink(missing_ok=True)
    if code := train.main(plan.train_options):
        return code
    if not (plan.trained / "config.json").is_file():
        story.tell_stopped(console, plan.trained)
        return 0
    story.stage(console, 4, "what it can do now")
    after = measure(plan.trained, problems, plan.seed)
    story.tell_measurement(console, after, len(problems))
    story.tell_styles(console, problems, after)
    story.show_answers(console, problems, before, after)
    seconds = round(time.perf_counter() - started, 1)
    _write_summary(plan, before, after, num_weights, seconds)
    story.close_with(console, plan.folder, before, after, seconds)
    return 0


def _write_summary(plan: Plan, before: Measurement, after: Measurement, num_weights: int, seconds: float) -> None:
    summary = {
        "accuracy_base": before.accuracy,
        "accuracy_sft": after.accuracy,
        "standard_error_sft": after.standard_error,
        "num_problems": plan.num_problems,
        "samples_per_problem": NUM_SAMPLES,
        "num_weights": num_weights,
        "seed": plan.seed,
        "seconds": seconds,
    }
    (plan.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser("python -m r1jax.quickstart", "Trains the built-in example on this machine's CPU.")
    parser.add_argument("--output_dir", default="outputs/quickstart", help="gets all files (outputs/quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the training problems and their order (0)")
    parser.add_argument("--num_problems", type=int, default=200, help="held-out problems to measure on (200)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for what would fail later."""
    require(0 <= args.seed < 2**32, "seed", "0 <= x < 2**32", args.seed, "choose a number in that range")
    count = args.num_problems
    require(1 <= count <= MAX_PROBLEMS, "num_problems", f"1 <= x <= {MAX_PROBLEMS}", count, "200 is the default")
    folder = Path(args.output_dir)
    require(not folder.exists() or folder.is_dir(), "output_dir", "a folder", args.output_dir, "name another")
    if not RECIPE.is_file():
        raise need("quickstart", f"the recipe {RECIPE}", "an installation without it", "run it from a checkout")


if __name__ == "__main__":
    sys.exit(main())
