"""What each key of the objective does to the quickstart's learning curve: its GRPO stage again, with one thing changed.

    .venv/bin/python -m bench.objectives --output_dir outputs/objectives [--seeds 0 1 2] [--variants NAME ...]
    .venv/bin/python -m bench.objectives --table

Every variant of a seed starts from the same fine-tuned model and goes through the same prompts. A row a run is appended
to bench/results/objectives.jsonl; what is there already for a commit's variant and seed is not run again. Nothing here
is timed, so it may run beside other work.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from bench.sft import ROOT, commit
from r1jax import runtime, train
from r1jax.quickstart.__main__ import main as quickstart
from r1jax.quickstart.measure import measure
from r1jax.quickstart.problems import held_out_problems

RECIPE = ROOT / "configs" / "quickstart" / "grpo.yaml"
RESULTS = ROOT / "bench" / "results" / "objectives.jsonl"
NUM_PROBLEMS = 500
STEPS = 30
"""Generations: half of the recipe's, before all curves meet under the ceiling. Its learning rate is constant, so that
is the first half of the quickstart."""

TWICE = {"num_iterations": 2, "max_steps": 2 * STEPS}
"""Each generation gone through twice: where every step is on policy the ratio is 1 and its bounds do nothing."""

VARIANTS: dict[str, dict[str, Any]] = {
    "recipe (dr_grpo, scale_rewards false)": {},
    "loss_type bnpo": {"loss_type": "bnpo"},
    "loss_type grpo": {"loss_type": "grpo"},
    "loss_type dapo": {"loss_type": "dapo"},
    "scale_rewards group": {"scale_rewards": "group"},
    "scale_rewards batch": {"scale_rewards": "batch"},
    "advantage_baseline leave_one_out": {"advantage_baseline": "leave_one_out"},
    "dynamic_sampling": {"dynamic_sampling": True},
    "replay_buffer_size 64": {"replay_buffer_size": 64},
    "prompt_curriculum pass_rate": {"prompt_curriculum": "pass_rate"},
    "beta 0.04": {"beta": 0.04},
    "beta 0.04, sync_ref_model every 10": {"beta": 0.04, "sync_ref_model": True, "ref_model_sync_steps": 10},
    "beta 0.04, use_bias_correction_kl": {"beta": 0.04, "use_bias_correction_kl": True},
    "entropy_coef 0.01": {"entropy_coef": 0.01},
    "use_adaptive_entropy": {"use_adaptive_entropy": True, "entropy_target": 0.5},
    "top_entropy_quantile 0.2": {"top_entropy_quantile": 0.2},
    "mask_truncated_completions": {"mask_truncated_completions": True},
    "top_p 0.9": {"top_p": 0.9},
    "use_peft, all-linear, rank 16, learning_rate 3e-3": {
        "use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 3e-3,
    },
    "num_iterations 2": TWICE,
    "num_iterations 2, epsilon_high 0.28": {**TWICE, "epsilon_high": 0.28},
    "num_iterations 2, delta 2": {**TWICE, "delta": 2.0},
    "num_iterations 2, grpo, sequence level (GSPO)": {
        **TWICE, "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-3, "epsilon_high": 4e-3,
    },
    "num_iterations 2, luspo, sequence level": {
        **TWICE, "loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 3e-3, "epsilon_high": 4e-3,
    },
    "num_iterations 2, cispo": {**TWICE, "loss_type": "cispo"},
    "num_iterations 2, sapo": {**TWICE, "loss_type": "sapo"},
    "num_iterations 2, vespo": {**TWICE, "loss_type": "vespo"},
    "num_iterations 2, off_policy_mask_threshold 0.1": {**TWICE, "off_policy_mask_threshold": 0.1},
    "num_iterations 2, dppo_mask_threshold 0.2": {**TWICE, "dppo_mask_threshold": 0.2, "epsilon": 0.9},
}  # fmt: skip


def curve(folder: Path) -> dict[str, float]:
    """The mean reward around a third, two thirds and the end of the run, and how it ended."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rewards = np.asarray([line["reward"] for line in lines if "reward" in line])
    last = [line for line in lines if "entropy" in line][-5:]
    # Only the first update on a generation tells of it.
    lengths = [line["completions/mean_length"] for line in lines if "completions/mean_length" in line][-5:]
    around = {f"reward_{part}": len(rewards) * part // 3 for part in (1, 2, 3)}
    return {
        **{name: float(rewards[max(stop - 5, 0) : stop].mean()) for name, stop in around.items()},
        "entropy": float(np.mean([line["entropy"] for line in last])),
        "mean_length": float(np.mean(lengths)),
    }


def run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The row of a variant; raises RuntimeError where its training fails."""
    out = folder / f"{seed}" / "variants" / "".join(letter if letter.isalnum() else "-" for letter in name)
    keys = {
        "config": RECIPE, "model_name_or_path": folder / f"{seed}" / "sft",
        "dataset_name": folder / f"{seed}" / "tasks", "output_dir": out, "seed": seed,
        "overwrite_output_dir": "true", "resume_from_checkpoint": "false",
        "save_strategy": "no", "report_to": "none", "max_steps": STEPS, **VARIANTS[name],
    }  # fmt: skip
    words = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    if train.main(words):
        raise RuntimeError(f"{name}, seed {seed}: the training failed")
    found = measure(out, held_out_problems(NUM_PROBLEMS), seed)
    return {
        "variant": name, "seed": seed, "accuracy": found.accuracy, **curve(out), "commit": commit(),
        "date": datetime.date.today().isoformat(), "keys": VARIANTS[name],
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """What was measured so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table(console: Console) -> None:
    """Prints the mean and the range over seeds, as Markdown."""
    titles = ("variant", "right %", "reward at 1/3", "2/3", "end", "entropy", "tokens", "seeds")
    console.print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), soft_wrap=True)
    measured = rows()
    for name in VARIANTS:
        own = {row["seed"]: row for row in measured if row["variant"] == name}.values()
        if own:
            cells = [_cell([100 * row["accuracy"] for row in own], 1)]
            cells += [_cell([row[f"reward_{part}"] for row in own], 2) for part in (1, 2, 3)]
            cells += [_cell([row["entropy"] for row in own], 2), _cell([row["mean_length"] for row in own], 1)]
            console.print(f"| {name} | " + " | ".join(cells) + f" | {len(own)} |", soft_wrap=True, highlight=False)


def _cell(values: list[float], digits: int) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def main(argv: list[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/objectives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="print what was measured so far and stop")
    args = parser.parse_args(argv)
    if args.table:
        table(Console(width=200))
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", "cpu")
    runtime.configure("float32")
    for seed in args.seeds:
        if not (args.output_dir / f"{seed}" / "sft" / "config.json").is_file() and quickstart(
            ["--output_dir", str(args.output_dir / f"{seed}"), "--seed", str(seed), "--grpo.max_steps", "1"]
        ):
            return 1
        for name in args.variants:
            if any(row["variant"] == name and row["seed"] == seed for row in rows()):
                continue
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run(name, seed, args.output_dir)) + "\n")
    table(Console(width=200))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
