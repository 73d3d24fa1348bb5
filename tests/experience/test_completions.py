import io

import pyarrow.parquet as pq
from rich.console import Console

from r1jax.experience.completions import (
    completion_rows,
    discard_completions,
    of_unique_prompts,
    print_completions,
    write_completions,
)

PROMPTS, TEXTS = ["p", "p", "q", "q"], ["one", "two", "three", "four\x1b[31m"]


def test_a_file_a_generation(experience, tmp_path):
    write_completions(tmp_path / "completions", 3, completion_rows(experience, 3, PROMPTS, TEXTS))
    (file,) = (tmp_path / "completions").iterdir()
    assert file.name == "completions_00003.parquet"
    rows = pq.read_table(file).to_pydict()
    assert rows["step"] == [3] * 4 and rows["prompt"] == PROMPTS and rows["completion"] == TEXTS
    assert rows["right"] == [1.0, 0.0, 1.0, 1.0] and rows["neat"] == [0.5, None, 0.0, 0.0]
    assert rows["advantage"] == experience.advantages.tolist()
    assert rows["completion_tokens"] == [3, 5, 4, 6] and rows["truncated"] == [False, False, False, True]


def test_each_prompt_once(experience):
    rows = of_unique_prompts(completion_rows(experience, 3, ["q", "p", "q", "p"], TEXTS))
    assert rows["prompt"] == ["q", "p"] and rows["completion"] == ["one", "two"] and rows["right"] == [1.0, 0.0]
    assert all(len(column) == 2 for column in rows.values())


def test_a_resumed_run_drops_what_comes_after_its_checkpoint(experience, tmp_path):
    for step in (1, 2, 3, 10):
        write_completions(tmp_path, step, completion_rows(experience, step, PROMPTS, TEXTS))
    (tmp_path / "completions_00004.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    discard_completions(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "completions_00001.parquet", "completions_00002.parquet", "notes.txt",
    ]  # fmt: skip
    discard_completions(tmp_path / "none", 0)


def written(console: Console) -> str:
    """What went to its file since it was last asked."""
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    console.file.truncate(0)
    return text


def test_the_table(experience):
    """Rewards and advantages beside the words; a missing reward is empty; nothing that a terminal would act upon."""
    console = Console(file=io.StringIO(), width=80)
    rows = completion_rows(experience, 3, PROMPTS, [*TEXTS[:3], "x" * 1000])
    print_completions(rows, 0, console)
    text = written(console)
    assert "step 3" in text and "three" in text and "0.71" in text and "(1000" in text
    assert max(map(len, text.splitlines())) == 160  # a file has no width of its own
    print_completions(completion_rows(experience, 3, PROMPTS, TEXTS), 2, console)
    text = written(console)
    assert "two" in text and "three" not in text and "\x1b[31m" not in text
