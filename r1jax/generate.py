"""Draws completions for a file of prompts.

    python -m r1jax.generate --model_name_or_path DIR --prompts IN.jsonl --output OUT.jsonl [--num_generations N] ...

A row has `prompt` (text, read as it is) or `messages` (put through the chat template); the same rows come out with
`generations`: [{text, token_ids, logprobs, finish_reason}]. token_ids end with the stop token that ended the text.
Started again, it keeps the rows that are finished; the result is that of a run that was never cut off.
With --engine vllm --vllm_server_url URL[,URL...] servers draw (docs/vllm.md); the model directory gives the tokenizer.
"""

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from r1jax import commands, runtime
from r1jax.checkpoints import peft
from r1jax.checkpoints.generation import generation_config, read_generation_config, stop_ids
from r1jax.checkpoints.hf import read_config
from r1jax.checkpoints.peft import ModelFolder
from r1jax.config.errors import at_least, need, require
from r1jax.config.folders import check_folder
from r1jax.models.attention.backends import choose, device_of
from r1jax.models.config import DecoderConfig
from r1jax.models.decoding import unstack
from r1jax.models.families import decoder_config
from r1jax.models.parameters import abstract_params
from r1jax.rollout import sample_file
from r1jax.rollout.sampler import Completion, Sampler, check_prompt
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_checks import Expected, check_servers, probe_prompt
from r1jax.rollout.vllm_client import VllmClient, check_urls
from r1jax.rollout.vllm_engine import completion_of
from r1jax.rollout.vllm_key import read_key
from r1jax.rollout.vllm_router import draw_samples

logger = logging.getLogger("r1jax.generate")

Prompts = Sequence[Sequence[int]]
Draw = Callable[[Prompts, range], list[list[Completion]]]
"""Draws each prompt's completions; the range has their rows' numbers."""

SERVER_SECONDS = 60.0
"""A vLLM server may take so long to answer at first; one that is being started takes a minute or more."""
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed")
"""Options that are fields of `SamplingSettings`."""


class Model(NamedTuple):
    """What a model directory says before its weights are read."""

    folder: ModelFolder
    config: DecoderConfig
    tokenizer: Any
    stop_ids: list[int]
    """Every token that ends an answer."""


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when every row has its generations."""
    return commands.run(_generate, sys.argv[1:] if argv is None else argv)


def _generate(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    settings = _check(args)
    runtime.configure(args.dtype)
    output = Path(args.output)
    rows = sample_file.read_prompts(Path(args.prompts))
    done = sample_file.finished(output, rows, _depended_on(args))
    model = open_model(args.model_name_or_path)
    prompts = [sample_file.encode_prompt(row, model.tokenizer) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        check_prompt(prompt, model.config, args.max_new_tokens, f"line {row.line}")
    if done.rows == len(rows):
        logger.info("%s holds all %d rows already; remove it to draw them again", output, done.rows)
        return 0
    if not model.stop_ids:
        logger.warning("the model names no token that ends an answer: all have %d tokens", args.max_new_tokens)
    settings = dataclasses.replace(settings, stop_ids=tuple(model.stop_ids))
    draw = (_serve if args.engine == "vllm" else _embed)(model, args, settings, prompts)
    sample_file.begin(output, done, _depended_on(args))
    num_tokens = _draw(draw, model, args, rows, prompts, done.rows)
    kept = f", {done.rows} of them from before" if done.rows else ""
    line = f"{output}: {len(rows)} rows{kept}, {args.num_generations} generations each; {num_tokens:,} tokens drawn"
    Console(soft_wrap=True, highlight=False).print(line, markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = commands.ArgumentParser("python -m r1jax.generate", "Draws completions for a file of prompts.")
    parser.add_argument(
        "--model_name_or_path", required=True, help="model or adapter in Hugging Face format, or a hub id"
    )
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` (text) or `messages`")
    parser.add_argument("--output", required=True, help="JSON lines that get the rows and their generations")
    parser.add_argument("--engine", choices=["jax", "vllm"], default="jax", help="who samples: jax, here (default)")
    parser.add_argument("--vllm_server_url", help="for --engine vllm: http://host:port, several with commas between")
    parser.add_argument("--num_generations", type=int, default=1, help="completions of each row (1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1.0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the fewest tokens that hold this (1.0)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from so many likeliest tokens, 0 means all (0)")
    parser.add_argument("--min_p", type=float, default=0.0, help="drop tokens below this share of the likeliest (0)")
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="divides logits of tokens already seen (1.0)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest completion in tokens (256)")
    parser.add_argument("--seed", type=int, default=42, help="the same seed draws the same completions (42)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument(
        "--batch_size", type=int, default=32, help="completions drawn at a time; changes no sample (32)"
    )
    return parser


def _check(args: argparse.Namespace) -> SamplingSettings:
    """The sampling settings, without stop ids; raises `UserError` for what needs no file to be seen as wrong."""
    if args.engine == "vllm":
        check_urls(_urls(args), "vllm_server_url")
        read_key()
    elif args.vllm_server_url:
        raise need("engine", "vllm with --vllm_server_url", args.engine, "add --engine vllm, or leave the address out")
    require(0 <= args.seed < 2**32, "seed", "0 <= x < 2**32", args.seed, "choose a number in that range")
    at_least("num_generations", args.num_generations, 1, "ask for at least one completion")
    at_least("batch_size", args.batch_size, 1, "use at least one slot")
    same = Path(args.output).absolute() == Path(args.prompts).absolute()
    check_folder("output", Path(args.output).parent)
    require(not same, "output", "another file than --prompts", args.output, "name another file")
    return SamplingSettings(**{name: getattr(args, name) for name in SAMPLING_OPTIONS})


def _depended_on(args: argparse.Namespace) -> dict[str, Any]:
    """What a completion depends on besides its row."""
    names = ("model_name_or_path", "num_generations", *SAMPLING_OPTIONS, "engine")
    # A server's dtype is the server's.
    return {name: getattr(args, name) for name in (*names, *(("dtype",) if args.engine == "jax" else ()))}


def _urls(args: argparse.Namespace) -> list[str]:
    return [url.strip() for url in (args.vllm_server_url or "").split(",") if url.strip()]


def open_model(name_or_path: str) -> Model:
    """The model's configuration and tokenizer; raises `UserError` for a model that cannot be read or run."""
    # Imported here: transformers takes seconds, which a usage error should not wait for.
    from r1jax.data.templates import prepare_tokenizer

    folder = peft.open_model(name_or_path)
    hf_config = read_config(folder.weights)
    config = decoder_config(hf_config)
    tokenizer = prepare_tokenizer(folder.tokenizer)
    given = read_generation_config(folder.holding("generation_config.json"))
    generation = generation_config(given, hf_config, tokenizer)
    return Model(folder, config, tokenizer, stop_ids(generation.get("eos_token_id")))


def load_sampler(model: Model, dtype: str = "float32") -> Sampler:
    """A sampler with the model's weights on the first device."""
    device = jax.local_devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shardings = jax.tree.map(lambda _: place, abstract_params(model.config))
    params = model.folder.load(model.config, shardings, jnp.dtype(dtype))
    backend = choose(device_of(device), dtype, model.config.head_dim)
    unstacked = jax.jit(unstack, static_argnames="dtype")(params, dtype)
    return Sampler(params=unstacked, config=model.config, backend=backend)


def _embed(model: Model, args: argparse.Namespace, settings: SamplingSettings, prompts: Prompts) -> Draw:
    """Draws here, on the first device."""
    del prompts
    sampler = load_sampler(model, args.dtype)
    sizes = {"num_generations": args.num_generations, "batch_size": args.batch_size}
    return lambda part, rows: sampler.generate(part, settings, prompt_ids=rows, **sizes)


def _serve(model: Model, args: argparse.Namespace, settings: SamplingSettings, prompts: Prompts) -> Draw:
    """Draws on vLLM servers, which have to fit; raises `UserError` otherwise."""
    client = VllmClient(_urls(args), read_key())
    expected = Expected(
        config=model.config,
        longest=max(map(len, prompts)) + args.max_new_tokens,
        stop_ids=settings.stop_ids,
        probe=probe_prompt(prompts),
        field="vllm_server_url",
        length_field="max_new_tokens",
    )
    served = check_servers(client, expected, start_seconds=SERVER_SECONDS).model
    about = {"model": served, "vocab_size": model.config.vocab_size, "num_generations": args.num_generations}

    def draw(part: Prompts, rows: range) -> list[list[Completion]]:
        drawn = draw_samples(client, part, rows, settings, step=None, **about)
        return [[completion_of(one) for one in group] for group in drawn]

    return draw


def _draw(
    draw: Draw,
    model: Model,
    args: argparse.Namespace,
    rows: Sequence[sample_file.PromptRow],
    prompts: Prompts,
    first: int,
) -> int:
    """Tokens drawn for the rows from `first` on, which are appended to the output a batch at a time."""
    size = max(1, args.batch_size // args.num_generations)
    started, num_tokens = time.perf_counter(), 0
    with _progress() as progress:
        task = progress.add_task("rows", total=len(rows), completed=first, speed="")
        for start in range(first, len(rows), size):
            part = range(start, min(start + size, len(rows)))
            drawn = draw([prompts[index] for index in part], part)
            generations = [[as_json(one, model) for one in completions] for completions in drawn]
            sample_file.append(Path(args.output), [rows[index].row for index in part], generations)
            num_tokens += sum(len(one.token_ids) for completions in drawn for one in completions)
            speed = num_tokens / (time.perf_counter() - started)
            progress.update(task, completed=part.stop, speed=f"{speed:,.0f} tokens/s")
    return num_tokens


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[speed]}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def as_json(completion: Completion, model: Model) -> dict[str, Any]:
    """The completion as the output file has it; the text leaves special tokens and the stop token out."""
    ended = completion.finish_reason == "stop"
    text = completion.token_ids[:-1] if ended else completion.token_ids
    return {
        "text": model.tokenizer.decode(text.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "token_ids": completion.token_ids.tolist(),
        "logprobs": completion.logprobs.tolist(),
        "finish_reason": completion.finish_reason,
    }


if __name__ == "__main__":
    sys.exit(main())
