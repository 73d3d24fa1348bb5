"""From nothing to a model that has learned to reason, on a CPU, through the real commands.

    python -m r1jax.quickstart [--output_dir outputs/quickstart] [--seed 0] [--num_problems 500]
                               [--sft.KEY value ...] [--grpo.KEY value ...]

Makes a task, a tokenizer and a small random Qwen3 model, fine-tunes it with configs/quickstart/sft.yaml, lets it
practise with configs/quickstart/grpo.yaml, and measures it before, between and after. Keys go to the recipe that they
name, as in `--sft.num_train_epochs 2`. A control, whose rewards are dice and teach nothing:

    python -m r1jax.quickstart --grpo.reward_funcs r1jax.quickstart.control:random_reward
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from r1jax import commands, config, runtime, train
from r1jax.config.errors import need, require
from r1jax.quickstart import story
from r1jax.quickstart.measure import NUM_SAMPLES, Measurement, measure
from r1jax.quickstart.problems import held_out_problems, write_examples, write_tasks

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "quickstart"
NUM_EXAMPLES = 36_000
"""Answers to imitate: one epoch of the recipe."""
NUM_TASKS = 2_400
"""Questions to practise on."""
MAX_PROBLEMS = 1_000
"""About 3,000 problems are held out."""

Stage = Literal["sft", "grpo"]


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
    recipe_keys: dict[Stage, tuple[str, ...]]
    """Options for each recipe."""

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def examples(self) -> Path:
        return self.folder / "examples"

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    def trained(self, stage: Stage) -> Path:
        """Where a stage leaves its model."""
        return self.folder / stage

    def train_options(self, stage: Stage) -> list[str]:
        """The options of r1jax.train; an earlier run is replaced."""
        recipe = RECIPES / f"{stage}.yaml"
        keys = {
            "config": recipe.relative_to(Path.cwd()) if recipe.is_relative_to(Path.cwd()) else recipe,
            "model_name_or_path": self.base if stage == "sft" else self.trained("sft"),
            "dataset_name": self.examples if stage == "sft" else self.tasks,
            "output_dir": self.trained(stage),
            "seed": self.seed,
            "resume_from_checkpoint": "false",
            "overwrite_output_dir": "true",
        }
        return [part for key, value in keys.items() for part in (f"--{key}", str(value))] + [*self.recipe_keys[stage]]


def _quickstart(argv: list[str]) -> int:
    started = time.perf_counter()
    args, rest = _parser().parse_known_args(argv)
    _check(args)
    plan = Plan(
        folder=Path(args.output_dir), seed=args.seed, num_problems=args.num_problems, recipe_keys=_by_recipe(rest)
    )
    # A wrong key must not wait for the training to be found.
    stages: tuple[Stage, ...] = ("sft", "grpo")
    dry: list[Stage] = [stage for stage in stages if config.load(plan.train_options(stage)).dry_run]
    if dry:
        return max(train.main(plan.train_options(stage)) for stage in dry)
    if not os.environ.get("JAX_PLATFORMS"):
        # The recipes are made for one CPU device: several accelerators would multiply their batches.
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
    write_examples(plan.examples, num_train=NUM_EXAMPLES, num_test=plan.num_problems, seed=plan.seed)
    write_tasks(plan.tasks, num_train=NUM_TASKS, num_test=plan.num_problems, seed=plan.seed)
    story.tell_material(console, problems[0], plan.folder, num_weights=num_weights, num_train=NUM_EXAMPLES)
    found = {"base": measure(plan.base, problems, plan.seed)}
    story.tell_measurement(console, found["base"], len(problems))
    titles: dict[Stage, str] = {"sft": "supervised fine-tuning: imitate", "grpo": "GRPO: practise"}
    for number, (stage, title) in enumerate(titles.items(), start=2):
        story.stage(console, number, title)
        story.tell_command(console, ["python", "-m", "r1jax.train", *plan.train_options(stage)])
        # An earlier run's model must not pass for this one's, should the training be stopped.
        (plan.trained(stage) / "config.json").unlink(missing_ok=True)
        if code := train.main(plan.train_options(stage)):
            return code
        if not (plan.trained(stage) / "config.json").is_file():
            story.tell_stopped(console, plan.trained(stage))
            return 0
        found[stage] = measure(plan.trained(stage), problems, plan.seed)
        story.tell_measurement(console, found[stage], len(problems))
        story.tell_styles(console, problems, found[stage])
    story.stage(console, 4, "before and after")
    story.plot_rewards(console, _rewards(plan.trained("grpo")))
    story.show_answers(console, problems, found)
    seconds = round(time.perf_counter() - started, 1)
    _write_summary(plan, found, num_weights, seconds)
    story.close_with(console, plan.folder, found, seconds)
    return 0


def _rewards(folder: Path) -> list[float]:
    """The mean reward of each logged step."""
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["reward"] for row in rows if "reward" in row]


def _write_summary(plan: Plan, found: dict[str, Measurement], num_weights: int, seconds: float) -> None:
    summary = {
        **{f"accuracy_{which}": one.accuracy for which, one in found.items()},
        **{f"standard_error_{which}": one.standard_error for which, one in found.items()},
        "num_problems": plan.num_problems,
        "samples_per_problem": NUM_SAMPLES,
        "num_weights": num_weights,
        "seed": plan.seed,
        "seconds": seconds,
    }
    (plan.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _by_recipe(words: Sequence[str]) -> dict[Stage, tuple[str, ...]]:
    """`--sft.KEY value` and `--grpo.KEY value` as options of each; raises `UserError` for a key of neither."""
    found: dict[Stage, list[str]] = {"sft": [], "grpo": []}
    into = found["sft"]
    for word in words:
        if word.startswith("--"):
            name, dot, key = word[2:].partition(".")
            if not dot or name not in found:
                raise need(word[2:], "--sft.KEY or --grpo.KEY", word, "name the recipe that the key is for")
            into, word = found[name], f"--{key}"
        into.append(word)
    return {stage: tuple(options) for stage, options in found.items()}


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser("python -m r1jax.quickstart", "Trains the built-in example on this machine's CPU.")
    parser.add_argument("--output_dir", default="outputs/quickstart", help="gets all files (outputs/quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the training problems and their order (0)")
    parser.add_argument("--num_problems", type=int, default=500, help="held-out problems to measure on (500)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for what would fail later."""
    require(0 <= args.seed < 2**32, "seed", "0 <= x < 2**32", args.seed, "choose a number in that range")
    count = args.num_problems
    require(1 <= count <= MAX_PROBLEMS, "num_problems", f"1 <= x <= {MAX_PROBLEMS}", count, "500 is the default")
    folder = Path(args.output_dir)
    require(not folder.exists() or folder.is_dir(), "output_dir", "a folder", args.output_dir, "name another")
    if not RECIPES.is_dir():
        raise need("quickstart", f"the recipes in {RECIPES}", "an installation without them", "run it from a checkout")


if __name__ == "__main__":
    sys.exit(main())
