import json
import sys

import jax
import pytest

from r1jax.config.data import DataConfig
from r1jax.config.errors import UserError
from r1jax.config.model import ModelConfig
from r1jax.config.reporting import ReportingConfig
from r1jax.config.schema import RunConfig
from r1jax.trackers import Trackers, open_trackers
from r1jax.trackers.jsonl import JsonLines
from r1jax.trackers.open import check_trackers


def config_for(*report_to):
    return RunConfig(
        model=ModelConfig(model_name_or_path="m"),
        data=DataConfig(dataset_name="d"),
        reporting=ReportingConfig(report_to=report_to),
    )


def test_metrics_are_written_even_when_no_tracker_is_asked_for(tmp_path):
    trackers = open_trackers(config_for("none"), tmp_path, start_step=0)
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_tensorboard_stands_beside_metrics(tmp_path):
    trackers = open_trackers(config_for("tensorboard"), tmp_path, start_step=0)
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "runs"]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_missing_package_is_the_users_to_mend(monkeypatch):
    check_trackers(ReportingConfig(report_to=("wandb",)))
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(ReportingConfig(report_to=("tensorboard",)))
    with pytest.raises(UserError, match=r"^report_to: need the wandb package .*; pip install 'r1jax\[wandb\]'"):
        check_trackers(ReportingConfig(report_to=("all",)))


def test_tables_go_to_trackers_that_show_them(tmp_path):
    class Tables:
        def __init__(self):
            self.shown = []

        def log(self, step, metrics):
            raise AssertionError("a table is no number")

        def log_table(self, step, name, columns):
            self.shown.append((step, name, columns))

        def close(self):
            pass

    tables = Tables()
    trackers = Trackers((JsonLines(tmp_path / "metrics.jsonl", 0), tables))
    trackers.log_table(3, "completions", {"prompt": ["p"]})
    trackers.members[0].close()
    assert tables.shown == [(3, "completions", {"prompt": ["p"]})]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    trackers = open_trackers(config_for("tensorboard"), tmp_path, start_step=0)
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    assert list(tmp_path.iterdir()) == []
