"""What convert and generate are given wrongly."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r1jax import convert, generate
from tests.bad_input.place import Place, assert_one_line

Words = Callable[[Place], list[str]]


def to(p: Place, *words: str, source: str | None = None, target: str | None = None, kind: str = "hf") -> list[str]:
    return [source or str(p.model), target or str(p.out), "--to", kind, *words]


def after(harm: object, words: list[str]) -> list[str]:
    """The words; the harm has been done when they are asked for."""
    del harm
    return words


def make_checkpoints(p: Place) -> str:
    assert convert.main(to(p, kind="orbax", target=str(p.folder / "run"))) == 0
    return str(p.folder / "run")


def damage(run: str) -> str:
    (Path(run) / "checkpoints" / "0" / "state" / "_METADATA").unlink()
    return run


CONVERT: dict[str, tuple[str, str, Words]] = {
    "no format": ("to", "nothing", lambda p: [str(p.model), str(p.out)]),
    "another format": ("to", "gguf", lambda p: to(p, kind="gguf")),
    "an option with a letter missing": ("dtyp", "--dtype", lambda p: to(p, "--dtyp", "float32")),
    "another dtype": ("dtype", "int8", lambda p: to(p, "--dtype", "int8")),
    "a dtype for checkpoints": ("dtype", "float32", lambda p: to(p, "--dtype", "float16", kind="orbax")),
    "no such source": ("SRC", "check the path", lambda p: to(p, source="./nowhere")),
    "a folder of something else": ("SRC", "neither", lambda p: to(p, source=str(p.folder))),
    "weights that are cut off": (
        "model_name_or_path", "whole safetensors", lambda p: after(
            (p.model / "model.safetensors").write_bytes(b"1234567890"), to(p))),
    "checkpoints to checkpoints": ("SRC", "choose --to hf", lambda p: to(p, source=make_checkpoints(p), kind="orbax")),
    "checkpoints in the way": ("DST", "remove them first", lambda p: to(p, target=make_checkpoints(p), kind="orbax")),
    "a damaged checkpoint": ("SRC", "damaged", lambda p: to(p, source=damage(make_checkpoints(p)))),
    "a target that is a file": ("DST", "the file", lambda p: to(p, target=str(p.rows))),
    "a target below a file": ("DST", "below the file", lambda p: to(p, target=str(p.rows / "out"), kind="orbax")),
    "a tokenizer of nobody": (
        "model_name_or_path", "nowhere", lambda p: to(p, "--model_name_or_path", "./nowhere")),
    "a tokenizer that is cut off": (
        "model_name_or_path", "tokenizer", lambda p: after((p.model / "tokenizer.json").write_text("{"), to(p))),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVERT)
def test_convert_refuses(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    field, said, words = CONVERT[kind]
    argv = words(place)
    assert_refused_by(convert.main, argv, place, field, said, capsys)


def assert_refused_by(
    main: Callable[[list[str]], int],
    argv: list[str],
    place: Place,
    field: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = place.everything()
    capsys.readouterr()
    assert main(argv) == 2
    assert_one_line(capsys.readouterr().err, field, said)
    assert place.everything() == before


def draw(p: Place, *words: str, rows: str = '{"prompt": "1 plus"}\n', **changes: str) -> list[str]:
    """The command's words, with a file of these rows."""
    (p.folder / "in.jsonl").write_text(rows)
    given = {
        "model_name_or_path": str(p.model), "prompts": str(p.folder / "in.jsonl"), "output": str(p.out), **changes,
    }  # fmt: skip
    return [*(part for key, value in given.items() for part in (f"--{key}", value)), "--max_new_tokens", "4", *words]


def without_template(p: Place) -> None:
    for path in p.model.glob("chat_template*"):
        path.unlink()


GENERATE: dict[str, tuple[str, str, Words]] = {
    "no prompts": ("prompts", "check the path", lambda p: draw(p, prompts="nowhere.jsonl")),
    "an empty file": ("prompts", "at least one row", lambda p: draw(p, rows="\n")),
    "JSON that breaks off": ("prompts", "line 2", lambda p: draw(p, rows='{"prompt": "1"}\n{"prom\n')),
    "rows without prompt": ("prompts", "line 1", lambda p: draw(p, rows='{"text": "1"}\n')),
    "messages without a template": (
        "prompts", "chat template", lambda p: after(without_template(p), draw(
            p, rows='{"messages": [{"role": "user", "content": "1"}]}\n'))),
    "a template that fails": (
        "prompts", "line 1", lambda p: after((p.model / "chat_template.jinja").write_text("{{ 1 // 0 }}"), draw(
            p, rows='{"messages": [{"role": "user", "content": "1"}]}\n'))),
    "the prompts as output": ("output", "another file", lambda p: draw(p, output=str(p.folder / "in.jsonl"))),
    "a folder as output": ("output", "a folder", lambda p: draw(p, output=str(p.model))),
    "an output below a file": ("output", "the file", lambda p: draw(p, output=str(p.rows / "out.jsonl"))),
    "somebody's output": ("output", "line 1", lambda p: draw(p, output=str(p.rows))),
    "a model without tokenizer": (
        "model_name_or_path", "tokenizer", lambda p: after(p.remove("tokenizer*"), draw(p))),
    "a tokenizer of another model": (
        "prompts", "below 60", lambda p: after(p.edit_json("config.json", vocab_size=60), draw(p))),
    "weights that are cut off": (
        "model_name_or_path", "whole safetensors", lambda p: after(
            (p.model / "model.safetensors").write_bytes(b"1234567890"), draw(p))),
    "a model without layers": (
        "model_name_or_path", "num_hidden_layers", lambda p: after(
            p.edit_json("config.json", num_hidden_layers=0), draw(p))),
    "a broken generation config": (
        "model_name_or_path", "generation_config.json", lambda p: after(
            (p.model / "generation_config.json").write_text("{"), draw(p))),
    "no completions": ("num_generations", "0", lambda p: draw(p, "--num_generations", "0")),
    "a temperature in words": ("temperature", "hot", lambda p: draw(p, "--temperature", "hot")),
    "no probability": ("top_p", "0", lambda p: draw(p, "--top_p", "0")),
    "another engine": ("engine", "jax", lambda p: draw(p, "--engine", "tensorrt")),
    "more tokens than positions": ("max_new_tokens", "256", lambda p: draw(p, "--max_new_tokens", "1000")),
}  # fmt: skip


@pytest.mark.parametrize("kind", GENERATE)
def test_generate_refuses(kind: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    field, said, words = GENERATE[kind]
    argv = words(place)
    assert_refused_by(generate.main, argv, place, field, said, capsys)
