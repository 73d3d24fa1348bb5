import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest

from r1jax.config import resolve
from r1jax.experience.observer import Observer, surprise
from r1jax.experience.report import experience_metrics
from tests.grpo.world import Pieces, assembled, draw, keys, prompt


@pytest.fixture(scope="module")
def pieces(world) -> Iterator[Pieces]:
    with assembled(keys(world, per_device_train_batch_size=8)) as found:
        yield found


@pytest.fixture(scope="module")
def seen(pieces):
    """Experience of two prompts."""
    return draw(pieces, [3, 8], 2)


def observer(world, folder, pieces, *, start_step=0, **changes):
    """(the observer, tables that it has sent); even steps are shown."""
    tables = []
    config = resolve(keys(world, log_completions=True) | changes).config
    made = Observer(
        config, folder, pieces.collector, pieces.task.train, lambda step: step % 2 == 0, start_step=start_step,
        log_table=lambda step, name, columns: tables.append((step, name, columns)),
    )  # fmt: skip
    return made, tables


def test_a_file_always_and_a_table_where_it_is_asked_for(world, tmp_path, pieces, seen, capsys):
    made, tables = observer(world, tmp_path, pieces)
    for done in (0, 1):
        made.observe(done, seen, experience_metrics(seen))
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [
        "completions_00001.parquet", "completions_00002.parquet",
    ]  # fmt: skip
    rows = pq.read_table(tmp_path / "completions" / "completions_00002.parquet").to_pydict()
    assert rows["prompt"] == [prompt(3)] * 2 + [prompt(8)] * 2
    assert rows["completion"] == pieces.collector.texts(seen.rollouts)
    ((step, name, columns),) = tables
    assert (step, name, columns["prompt"]) == (2, "completions", [prompt(3), prompt(8)])
    assert columns["completion"] == rows["completion"][::2]
    shown = capsys.readouterr().err
    assert "step 2" in shown and "step 1" not in shown


def test_every_completion_goes_out_if_prompts_need_not_be_unique(world, tmp_path, pieces, seen):
    made, tables = observer(world, tmp_path, pieces, wandb_log_unique_prompts=False)
    made.observe(1, seen, experience_metrics(seen))
    assert len(tables[0][2]["prompt"]) == 4


def test_nothing_is_written_unless_asked_for(world, tmp_path, pieces, seen, capsys):
    made, tables = observer(world, tmp_path, pieces, log_completions=False)
    made.observe(1, seen, experience_metrics(seen))
    assert list(tmp_path.iterdir()) == [] and tables == [] and capsys.readouterr().err == ""


def test_a_resumed_run_drops_later_files_at_once(world, tmp_path, pieces, seen):
    made, _ = observer(world, tmp_path, pieces)
    for done in range(4):
        made.observe(done, seen, experience_metrics(seen))
    observer(world, tmp_path, pieces, start_step=3)
    assert len(list((tmp_path / "completions").iterdir())) == 3


def test_the_last_question_of_a_conversation_is_readable(world, tmp_path, pieces, seen):
    """System prompts are the same for all and left out."""
    rows = pieces.task.train.rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    talks = dataclasses.replace(pieces.task.train, rows=rows, conversational=True, system_prompt="be brief")
    made, tables = observer(
        world, tmp_path, dataclasses.replace(pieces, task=dataclasses.replace(pieces.task, train=talks))
    )
    made.observe(1, seen, experience_metrics(seen))
    assert tables[0][2]["prompt"] == [prompt(3), prompt(8)]


def test_surprise_is_the_mean_of_minus_log_p(experience):
    """Every drawn token has log-probability -1 at the temperature."""
    assert surprise(experience) == pytest.approx(1.0)
    halved = tuple(
        dataclasses.replace(one, policy_logprobs=(one.action_mask * math.log(0.5)).astype(np.float32))
        for one in experience.rollouts
    )
    assert surprise(dataclasses.replace(experience, rollouts=halved)) == pytest.approx(math.log(2))
