"""How many held-out problems a model gets right, and what it writes."""

import dataclasses
import math
from pathlib import Path

from r1jax import generate
from r1jax.quickstart.problems import Problem, answer_in
from r1jax.rollout.settings import SamplingSettings

NUM_SAMPLES = 4
"""Completions of each problem, at temperature 1."""
MAX_NEW_TOKENS = 64
"""The longest worked answer has 55."""
BATCH_SIZE = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A model's answers to the held-out problems."""

    accuracy: float
    """Share of all samples with the right number between the answer tags."""
    standard_error: float
    """Of the accuracy, over problems."""
    texts: list[list[str]]
    """Each problem's samples."""


def measure(model_dir: Path, problems: list[Problem], seed: int) -> Measurement:
    """What the model in the directory does on the problems, sampled at temperature 1."""
    model = generate.open_model(str(model_dir))
    sampler = generate.load_sampler(model)
    drawn = sampler.generate(
        [_prompt(problem, model) for problem in problems],
        SamplingSettings(max_new_tokens=MAX_NEW_TOKENS, stop_ids=tuple(model.stop_ids), seed=seed),
        num_generations=NUM_SAMPLES,
        batch_size=BATCH_SIZE,
    )
    texts = [[generate.as_json(one, model)["text"] for one in completions] for completions in drawn]
    return score(problems, texts)


def score(problems: list[Problem], texts: list[list[str]]) -> Measurement:
    """The measurement that these samples make."""
    shares = [
        sum(answer_in(text) == problem.answer for text in samples) / len(samples)
        for problem, samples in zip(problems, texts, strict=True)
    ]
    mean = sum(shares) / len(shares)
    variance = sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1)
    return Measurement(accuracy=mean, standard_error=math.sqrt(variance / len(shares)), texts=texts)


def _prompt(problem: Problem, model: generate.Model) -> list[int]:
    messages = [{"role": "user", "content": problem.question}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]
