"""Weights & Biases, an extra; with WANDB_MODE=offline it writes output_dir/wandb and needs no network."""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax.config.reporting import ReportingConfig
from r1jax.trackers.tracker import Metrics, chart_name


class WeightsAndBiases:
    """One W&B run for all starts of the run.

    W&B keeps the first row that it gets for a step, so what was logged after the checkpoint stays as it was and the
    resumed run's rows for those steps are dropped there (not in metrics.jsonl). A resumed run repeats these steps bit
    for bit, so the rows say the same but for timings. W&B's own rewind (`resume_from`) is not used: it is a preview,
    self-managed servers lack it, and what a server makes of a synced offline run that rewinds could not be tried.
    """

    def __init__(self, config: ReportingConfig, output_dir: Path, start_step: int, run_config: Mapping[str, Any]):
        """The package must be there (`open.check_trackers`)."""
        import wandb

        export_names(config)
        output_dir.mkdir(parents=True, exist_ok=True)
        self._table = wandb.Table
        self._run = wandb.init(
            name=config.run_name or str(output_dir),
            dir=str(output_dir),
            id=run_id(output_dir / "wandb_run_id", start_step),
            resume="allow",
            config=dict(run_config),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({chart_name(name): float(value) for name, value in metrics.items()}, step=step)

    def log_table(self, step: int, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        rows: list[Any] = [list(row) for row in zip(*columns.values(), strict=True)]
        self._run.log({name: self._table(columns=list(columns), data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


def export_names(config: ReportingConfig) -> None:
    """Nothing; sets WANDB_ENTITY, WANDB_PROJECT and WANDB_RUN_GROUP where the config gives them, as open-r1 does."""
    names = {
        "WANDB_ENTITY": config.wandb_entity,
        "WANDB_PROJECT": config.wandb_project,
        "WANDB_RUN_GROUP": config.wandb_run_group,
    }
    os.environ.update({name: value for name, value in names.items() if value is not None})


def run_id(path: Path, start_step: int) -> str:
    """The id in the file when the run goes on, else a fresh one, which the file then holds."""
    if start_step == 0 or not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
