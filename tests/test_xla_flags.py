"""The table of compiler flags: each is known to the installed jaxlib, and is there before the compiler looks."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from r1jax.config.errors import UserError
from r1jax.xla_flags import DETERMINISTIC, FIRST_JAX, FLAGS, LAST_JAX, VARIABLES, Flag, add_flags, with_flags
from tests.tiny import sums, write_model, write_rows

UNKNOWN = Flag(name="xla_gpu_no_such_flag", value="true", why="to see the process end")
COMPILE = "import jax; print(jax.jit(lambda x: x + 1)(1))"
COMMAND = """
import sys
from r1jax import xla_flags
from r1jax.{module} import main
xla_flags.FLAGS["cpu"] = (xla_flags.Flag(name="xla_gpu_no_such_flag", value="true", why=""),)
sys.exit(main(sys.argv[1:]))
"""


def run(code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("JAX_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_installed_jax_is_one_of_those_that_were_tried():
    """Fails with a new jax: run the tests of this file and of tests/aot with it, then move LAST_JAX."""
    assert FIRST_JAX <= jax.__version_info__[:2] <= LAST_JAX


def test_jaxlib_knows_every_flag():
    """The parser is the same for all platforms; libtpu's own flags are tried where it is installed (tests/aot)."""
    flags = [str(flag) for platform, many in FLAGS.items() if VARIABLES[platform] == "XLA_FLAGS" for flag in many]
    assert len(flags) >= 4
    done = run(COMPILE, XLA_FLAGS=" ".join([*flags, str(DETERMINISTIC)]))
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_jaxlib_ends_a_process_for_an_unknown_flag():
    done = run(COMPILE, XLA_FLAGS=str(UNKNOWN))
    assert done.returncode != 0
    assert f"Unknown flag in XLA_FLAGS: {UNKNOWN}" in done.stderr


@pytest.mark.parametrize("module", ["train", "generate", "quickstart.__main__"])
def test_commands_set_the_flags_before_the_compiler_looks(module: str, tmp_path: Path):
    """With an unknown flag in the table the command ends when XLA is first used; set too late it would do no harm."""
    model = str(write_model(tmp_path / "model"))
    rows = str(write_rows(tmp_path / "rows.jsonl", sums(8)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"task: sft\nmodel_name_or_path: {model}\ndataset_name: {rows}\noutput_dir: {tmp_path / 'out'}\n"
        "max_length: 32\nmax_steps: 1\nbf16: false\n"
    )
    prompts = str(write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1"}]))
    arguments = {
        "train": ["--config", str(recipe)],
        "generate": [
            "--model_name_or_path", model, "--prompts", prompts, "--output", str(tmp_path / "out.jsonl"),
            "--max_new_tokens", "4",
        ],
        "quickstart.__main__": ["--output_dir", str(tmp_path / "out")],
    }  # fmt: skip
    done = run(COMMAND.format(module=module), *arguments[module])
    assert f"Unknown flag in XLA_FLAGS: {UNKNOWN}" in done.stderr
    assert done.returncode != 0


def added(
    platforms: list[str], version: tuple[int, ...] = (0, 10, 2), deterministic: bool = False, **environ: str
) -> dict[str, str]:
    add_flags(environ, platforms, version, deterministic=deterministic)
    return environ


def test_each_platform_has_its_variable():
    assert added(["cpu"]) == {}
    assert added(["cpu", "metal"]) == {}
    assert added(["cpu", "gpu"]) == {"XLA_FLAGS": " ".join(map(str, FLAGS["gpu"]))}
    assert added(["tpu"]) == {}
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in added(["gpu"])["XLA_FLAGS"].split()


def test_a_jax_that_was_not_tried_gets_no_flags_but_what_was_asked_for():
    for version in ((0, 9, 9), (0, 13, 0), (1, 0, 0)):
        assert added(["gpu", "tpu"], version) == {}
        assert added(["gpu"], version, deterministic=True) == {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


def test_what_the_user_sets_stays():
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false  --xla_dump_to=there"
    found = added(["gpu"], XLA_FLAGS=mine)["XLA_FLAGS"].split()
    assert found[:2] == mine.split()
    assert [word.partition("=")[0] for word in found].count("--xla_gpu_enable_latency_hiding_scheduler") == 1
    assert len(found) == 1 + len(FLAGS["gpu"])
    assert with_flags("--xla_gpu_deterministic_ops", [DETERMINISTIC]) == "--xla_gpu_deterministic_ops"


def test_flags_are_added_once():
    once = added(["gpu"], deterministic=True)
    again = dict(once)
    add_flags(again, ["gpu"], (0, 12, 0), deterministic=True)
    assert again == once


def test_a_file_of_flags_stays_the_users():
    assert added(["gpu"], XLA_FLAGS="flags.txt") == {"XLA_FLAGS": "flags.txt"}
    with pytest.raises(
        UserError, match=r"^XLA_FLAGS: need flags when deterministic is true, got the file 'flags.txt'; "
    ):
        added(["gpu"], deterministic=True, XLA_FLAGS="flags.txt")
