"""What the quickstart tells on the way: to somebody who sees these commands for the first time."""

import random
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from r1jax.quickstart.measure import NUM_SAMPLES, Measurement
from r1jax.quickstart.problems import Problem, answer_in, guess_at, is_worked, response

NUM_STAGES = 4
NUM_SHOWN = 4
"""Problems whose answers are shown."""
PLOT_WIDTH, PLOT_HEIGHT = 60, 5
STAGES = {"base": "random weights", "sft": "after SFT", "grpo": "after GRPO"}


def make_console() -> Console:
    """Standard output; in a file, lines are wide enough not to be broken."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def open_with(console: Console, folder: Path) -> None:
    """Says what will happen."""
    text = (
        "A small model learns to think before it answers, on this machine's CPU, through the commands that train a "
        "large one: first it imitates answers, good ones and guesses, then it practises, and being right is rewarded."
        "\nEverything is made here and nothing is downloaded: a task, a tokenizer, a Qwen3 model with random weights."
        f"\nAll files go to {folder}."
    )
    console.print(Panel(Text(text), title="r1jax quickstart", padding=(1, 2)))


def stage(console: Console, number: int, title: str) -> None:
    """Begins a stage."""
    console.print()
    console.rule(f"{number}/{NUM_STAGES}  {title}", align="left")


def tell_material(console: Console, problem: Problem, folder: Path, *, num_weights: int, num_train: int) -> None:
    """Shows the model, the data and what one row asks and answers."""
    guess = guess_at(problem, random.Random(0))
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("model", Text(f"{folder / 'base'}  Qwen3 architecture, {num_weights:,} random weights"))
    table.add_row(
        "examples", Text(f"{folder / 'examples'}  {num_train:,} questions with answers, half of them guesses")
    )
    table.add_row(
        "tasks", Text(f"{folder / 'tasks'}  questions with their solutions; others are held out by their hash")
    )
    table.add_row("question", Text(problem.question))
    table.add_row("worked answer", Text(one_line(response(problem))))
    table.add_row("a guess", Text(one_line(response(problem, guess))))
    console.print(table)


def tell_measurement(console: Console, found: Measurement, num_problems: int) -> None:
    """Shows the accuracy and how it was measured."""
    console.print(
        f"[bold]{found.accuracy:.1%}[/bold] right (standard error {found.standard_error:.1%}): "
        f"{num_problems} held-out problems, {NUM_SAMPLES} samples of each at temperature 1"
    )


def tell_command(console: Console, command: Sequence[str]) -> None:
    """Shows the command that comes next, as one could type it."""
    console.print(Text(shlex.join(command), style="cyan"), soft_wrap=True)


def tell_stopped(console: Console, trained: Path) -> None:
    """Says that the training was ended from outside, and where what it has done is."""
    console.print(Text(f"The training was stopped: {trained / 'checkpoints'} holds it up to here, and no model."))


def tell_styles(console: Console, problems: list[Problem], found: Measurement) -> None:
    """Shows how often the model works the problem out, and which style is right how often."""
    samples = [(problem, text) for problem, texts in zip(problems, found.texts, strict=True) for text in texts]
    for what, worked in (("work it out", True), ("guess", False)):
        right = [_is_right(problem, text) for problem, text in samples if is_worked(text) == worked]
        if right:
            share, accuracy = len(right) / len(samples), sum(right) / len(right)
            console.print(f"  {share:4.0%} of the answers {what}, and {accuracy:.0%} of these are right")


def show_answers(console: Console, problems: list[Problem], found: Mapping[str, Measurement]) -> None:
    """Shows the first sample of the first problems, at each stage."""
    table = Table(title="the first questions, stage by stage", title_justify="left", show_lines=True)
    for heading in ("question", *(STAGES[which] for which in found)):
        table.add_column(heading)
    for index, problem in enumerate(problems[:NUM_SHOWN]):
        cells = [_marked(problem, one.texts[index][0]) for one in found.values()]
        table.add_row(Text(f"{problem.question}\n({problem.answer})"), *cells)
    console.print(table)


def plot_rewards(console: Console, rewards: Sequence[float]) -> None:
    """Shows the mean reward over the steps of GRPO: a column of blocks for a few steps each."""
    if not rewards:
        return
    width = min(len(rewards), PLOT_WIDTH)
    parts = [rewards[at * len(rewards) // width : (at + 1) * len(rewards) // width] for at in range(width)]
    means = [sum(part) / len(part) for part in parts]
    console.print("share of rewarded completions")
    for level in reversed(range(PLOT_HEIGHT)):
        label = f"{(level + 1) / PLOT_HEIGHT:4.0%} "
        console.print(Text(label + "".join(_block(mean * PLOT_HEIGHT - level) for mean in means), style="green"))
    console.print(f"step 1{len(rewards):>{width - 1}}")


def _block(height: float) -> str:
    """An eighth block, space for nothing and a full one for 1 and more."""
    return " ▁▂▃▄▅▆▇█"[max(0, min(8, round(height * 8)))]


def _marked(problem: Problem, text: str) -> Text:
    """The text with a mark for right or wrong."""
    right = _is_right(problem, text)
    shown = Text(one_line(text)[:120])
    return shown.append("  ✓" if right else "  ✗", style="bold green" if right else "bold red")


def _is_right(problem: Problem, text: str) -> bool:
    return answer_in(text) == problem.answer


def one_line(text: str) -> str:
    """The text with its line breaks as spaces and nothing that a terminal would act upon."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def close_with(console: Console, folder: Path, found: Mapping[str, Measurement], seconds: float) -> None:
    """Sums up and says what to do next."""
    lines = Text()
    lines.append(" -> ".join(f"{one.accuracy:.1%}" for one in found.values()), style="bold green")
    lines.append(
        f" of held-out problems right ({', '.join(STAGES[which] for which in found)}), {seconds:.0f} seconds\n\n"
    )
    for path, what in (
        ("grpo", "the model, as transformers and vLLM load it; sft has the one before"),
        ("grpo/metrics.jsonl", "reward, entropy, lengths, speed of every step; runs/ has them for tensorboard"),
        ("grpo/checkpoints", "what an interrupted run goes on from"),
        ("summary.json", "these numbers"),
    ):
        lines.append(f"{folder / path}  ", style="bold").append(f"{what}\n")
    lines.rstrip()
    console.print()
    console.print(Panel(lines, title="done", padding=(1, 2)))
    console.print("Next:")
    for command, what in _next_commands(folder):
        # Not in the panel, and never broken: commands are there to be copied.
        console.print(Text(f"  {what}"), Text(f"    {command}", style="cyan"), sep="\n", soft_wrap=True)


def _next_commands(folder: Path) -> list[tuple[str, str]]:
    """What to try after the quickstart, and why."""
    model, questions, answers = (folder / name for name in ("grpo", "tasks/questions.jsonl", "answers.jsonl"))
    return [
        (
            f"python -m r1jax.generate --model_name_or_path {model} --prompts {questions} --output {answers}",
            "ask it all held-out questions",
        ),
        (
            "python -m r1jax.train --config configs/quickstart/grpo.yaml --dry_run",
            "every setting of the training, with where it came from; the file is a recipe to start from",
        ),
        (
            "python -m r1jax.train --config configs/SmolLM2-135M-Instruct/grpo.yaml",
            "the same with a pretrained model and a real dataset from the hub",
        ),
    ]
