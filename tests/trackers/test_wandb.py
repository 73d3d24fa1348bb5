import json
import os
import subprocess
import sys

import pytest

from r1jax.config.reporting import ReportingConfig
from r1jax.trackers.wandb import export_names, run_id

NAMES = ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_RUN_GROUP")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """The tracker writes to os.environ; monkeypatch puts back what it has seen."""
    for name in NAMES:
        monkeypatch.setenv(name, "")


def test_only_names_that_the_config_gives_are_exported(monkeypatch):
    export_names(ReportingConfig(wandb_project="reasoning", wandb_run_group="seed-1"))
    assert [os.environ[name] for name in NAMES] == ["", "reasoning", "seed-1"]


def test_a_resumed_run_keeps_its_id_and_a_fresh_one_gets_another(tmp_path):
    path = tmp_path / "wandb_run_id"
    first = run_id(path, start_step=0)
    assert run_id(path, start_step=5) == first
    assert run_id(path, start_step=0) != first


OFFLINE_RUN = """
import pathlib, sys
from r1jax.config.reporting import ReportingConfig
from r1jax.trackers.wandb import WeightsAndBiases
tracker = WeightsAndBiases(ReportingConfig(report_to=("wandb",), run_name="trial"), pathlib.Path(sys.argv[1]), 0, {})
tracker.log(1, {"loss": 0.5})
tracker.log_table(2, "completions", {"prompt": ["one plus one", "two"], "right": [1.0, None]})
tracker.close()
"""


def test_offline_a_run_is_written_to_the_output_dir(tmp_path, monkeypatch):
    """In a process of its own, as in a run: late in a long pytest process W&B's service writes the header alone."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    subprocess.run([sys.executable, "-c", OFFLINE_RUN, str(tmp_path)], check=True, timeout=120)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"train/loss" in content and b"trial" in content
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/completions_*.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == ["prompt", "right"] and shown["data"] == [["one plus one", 1.0], ["two", None]]
