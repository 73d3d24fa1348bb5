import json
import math

import numpy as np
import pytest

from r1jax.trackers.jsonl import JsonLines, truncate


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_is_readable_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonLines(path, start_step=0)
    tracker.log(1, {"loss": 0.5, "num_tokens": 7})
    assert path.read_text() == '{"step": 1, "loss": 0.5, "num_tokens": 7}\n'
    tracker.close()


def test_what_json_cannot_spell_becomes_null(tmp_path):
    tracker = JsonLines(tmp_path / "metrics.jsonl", start_step=0)
    tracker.log(1, {"loss": math.nan, "grad_norm": -math.inf, "reward": np.float32(0.5), "num_tokens": np.int64(2)})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "reward": 0.5, "num_tokens": 2}\n'


def test_a_resumed_run_drops_later_rows_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1.0}\n{"step": 3}\n{"step": 2, "los')
    tracker = JsonLines(path, start_step=2)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert rows(path) == [{"step": 1}, {"step": 2}, {"step": 2, "eval_loss": 1.0}, {"step": 3, "loss": 1.0}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 2, "loss": 1.0}', b'{"st\n', b"\xff\xfe\n", b"[2]\n", b'{"loss": 1.0}\n'])
def test_what_is_no_row_goes_and_the_rest_keeps_its_bytes(tmp_path, torn):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(b'{"step":1,  "text": "\xc3\xa4"}\n' + torn)
    truncate(path, 2)
    assert path.read_bytes() == b'{"step":1,  "text": "\xc3\xa4"}\n'


def test_a_fresh_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    JsonLines(path, start_step=0).close()
    assert path.read_text() == ""
