"""Exit codes and one-line errors of commands."""

import logging

import pytest

from r1jax import commands
from r1jax.config.errors import UserError


def test_exit_codes(capsys):
    assert commands.run(lambda argv: None, []) == 0
    assert commands.run(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert capsys.readouterr().err == ""


def test_user_errors_are_one_line_on_stderr(capsys):
    def body(argv: list[str]) -> None:
        raise UserError("seed: need a number,\n got 'x'; write one")

    assert commands.run(body, []) == 2
    captured = capsys.readouterr()
    assert captured.err == "seed: need a number, got 'x'; write one\n"
    assert captured.out == ""


def test_our_own_errors_keep_their_traceback():
    def body(argv: list[str]) -> None:
        raise ValueError("a library's")

    with pytest.raises(ValueError, match="a library's"):
        commands.run(body, [])


def test_interrupt(capsys):
    def body(argv: list[str]) -> None:
        raise KeyboardInterrupt

    assert commands.run(body, []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_logging_level_may_be_set_again(capsys):
    log = logging.getLogger("r1jax.example")
    commands.configure_logging("passive")
    commands.configure_logging("error")
    log.info("hidden")
    log.error("shown")
    commands.configure_logging("passive")
    log.info("also shown")
    err = capsys.readouterr().err
    assert "hidden" not in err
    assert err.count("also shown") == 1
    assert err.count("shown") == 2


@pytest.fixture
def parser():
    parser = commands.ArgumentParser("r1jax.example", "An example.")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    return parser


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "model_name_or_path: need a value, got nothing; give --model_name_or_path"),
        (
            ["--model_name_or_path", "m", "--temperature", "hot"],
            "temperature: need a value of type float, got 'hot'; see --help",
        ),
        (
            ["--model_name_or_path", "m", "--temperatur=1"],
            "temperatur: need a known option, got an unknown one; the nearest is --temperature",
        ),
        (
            ["--model_name_or_path", "m", "--dtype", "int8"],
            "dtype: need one of float32, bfloat16, got 'int8'; choose one of them",
        ),
        (["--model_name_or_path", "m", "x"], "x: need a known option, got an unknown one; see --help"),
        (
            ["--model_name_or_path"],
            "model_name_or_path: need one argument, got another number of them; see --help",
        ),
    ],
)
def test_argument_mistakes_are_user_errors(parser, argv, line):
    with pytest.raises(UserError) as caught:
        parser.parse_args(argv)
    assert str(caught.value) == line
