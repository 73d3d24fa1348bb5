"""The peer: a transformers model in a plain torch loop, at the best of its settings.

`python -m bench.gpu.torch_side CASE` prints a JSON line for every setting that it has measured. Fused AdamW over
float32 weights, which are multiplied as autocast casts them (transformers' Trainer) or as a bfloat16 copy that a step
makes of them (DeepSpeed's bf16, FSDP2's mixed precision), whose residual stream is bfloat16 too; layers and loss by
torch.compile or not. All logits at once and nothing computed twice; where that finds no room, gradient checkpointing
and the loss in chunks of tokens. The flash kernel of scaled_dot_product_attention where rows are one document, flex
attention or a mask where they are several. Completions: `generate` with a static cache, which it compiles, and with one
that grows.
"""
# torch is not installed where types are checked without it.
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false

import functools
import gc
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu.cases import Case, case_named, packed
from bench.gpu.timing import rounds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK = 1024
"""Tokens whose logits exist at one time, with gradient checkpointing."""
Setting = dict[str, Any]
Terms = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden states [n, D], output vectors [V, D], targets [n]) -> [n]"""


def settings_of(case: Case) -> list[Setting]:
    """The likely fastest first, behind one that needs no compiler and so leaves a number in any case."""
    if case.kind == "decode":
        return [{"attention": "sdpa", "cache": cache} for cache in ("static", "dynamic")]
    plain = {"attention": "sdpa", "weights": "copied", "compile": False}
    # flex attention is a template that torch.compile fills in.
    compiled = plain | {"attention": "sdpa" if case.documents == 1 else "flex_attention", "compile": True}
    if DEVICE.type != "cuda":
        return [plain, plain | {"weights": "autocast"}]
    return [plain, compiled, compiled | {"weights": "autocast"}]


def ways(case: Case, setting: Setting) -> list[Setting]:
    """The setting as it is tried, until there is room."""
    return [setting] if case.kind == "decode" else [setting | {"gradient_checkpointing": on} for on in (False, True)]


def make_model(case: Case, attention: str, dtype: torch.dtype) -> Any:
    """Random weights on the device."""
    fields = dict(case.hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def chunk_terms(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probability of each target, float32."""
    logits = functional.linear(hidden, head).float()
    return -functional.cross_entropy(logits, targets, reduction="none")


def in_chunks(terms: Terms, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of all tokens, a chunk's logits at a time, made again in the backward pass."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(terms, part, head, ids, use_reentrant=False) for part, ids in parts])


class Update:
    """A step's work."""

    def __init__(self, case: Case, setting: Setting):
        torch.manual_seed(0)
        self._case, half = case, case.dtype == "bfloat16"
        copied = half and setting["weights"] == "copied"
        self._model = make_model(case, setting["attention"], torch.bfloat16 if copied else torch.float32).train()
        self._terms: Terms = torch.compile(chunk_terms) if setting["compile"] else chunk_terms
        if setting["gradient_checkpointing"]:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
            self._terms = functools.partial(in_chunks, self._terms)
        if setting["compile"]:
            # A layer at a time: the whole model takes minutes and is hardly faster.
            for layer in self._model.model.layers:
                layer.compile()
        self._used = list(self._model.parameters())
        self._kept = [weight.detach().float() for weight in self._used] if copied else self._used
        fused = DEVICE.type == "cuda"
        self._optimizer = torch.optim.AdamW(self._kept, 1e-4, weight_decay=0.0, fused=fused)
        fields = {name: torch.from_numpy(leaf).long().to(DEVICE) for name, leaf in packed(case).items()}
        self._tokens, self._positions = fields["tokens"], fields["positions"]
        self._trained = (self._positions[:, 1:] > 0).reshape(-1)
        # As r1jax's side has them: those of a policy that knows nothing.
        generator = torch.Generator(DEVICE).manual_seed(1)
        near = torch.randn(self._trained.shape, generator=generator, device=DEVICE)
        self._old = -torch.log(torch.tensor(float(case.decoder.vocab_size), device=DEVICE)) + 0.05 * near
        self._advantages = torch.randn(self._trained.shape, generator=generator, device=DEVICE)
        self._autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=half and not copied)

    def run(self, count: int) -> None:
        """So many steps, done."""
        for _ in range(count):
            with self._autocast:
                positions = {} if self._case.documents == 1 else {"position_ids": self._positions}
                hidden = self._model.model(input_ids=self._tokens, use_cache=False, **positions).last_hidden_state
                flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
                found = self._terms(flat, self._model.lm_head.weight, self._tokens[:, 1:].reshape(-1))
            self._loss(found).backward()
            self._update()
        wait()

    def _update(self) -> None:
        if self._kept is not self._used:
            for kept, used in zip(self._kept, self._used, strict=True):
                kept.grad, used.grad = None if used.grad is None else used.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._kept, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._kept is not self._used:
            with torch.no_grad():
                for kept, used in zip(self._kept, self._used, strict=True):
                    used.copy_(kept)

    def _loss(self, logprobs: torch.Tensor) -> torch.Tensor:
        if self._case.kind == "sft":
            terms = -logprobs
        else:
            ratio = torch.exp(logprobs - self._old)
            terms = -torch.min(ratio * self._advantages, ratio.clamp(0.8, 1.2) * self._advantages)
        return (terms * self._trained).sum() / self._trained.sum()


class Decode:
    """transformers' generate, a key/value cache and sdpa."""

    def __init__(self, case: Case, setting: Setting):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        self._model = make_model(case, setting["attention"], dtype).eval()
        shape = (case.documents, case.prompt_length)
        prompts = torch.randint(case.decoder.vocab_size, shape, device=DEVICE)
        self._prompts = prompts.repeat_interleave(case.rows // case.documents, dim=0)
        self._new = case.row_length
        self._cache = None if setting["cache"] == "dynamic" else setting["cache"]

    def run(self, count: int) -> None:
        for _ in range(count):
            with torch.inference_mode():
                self._model.generate(
                    self._prompts, attention_mask=torch.ones_like(self._prompts), max_new_tokens=self._new,
                    min_new_tokens=self._new, do_sample=True, top_k=0, pad_token_id=0,
                    cache_implementation=self._cache,
                )  # fmt: skip
        wait()


def wait() -> None:
    """Until the device is idle."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tried(case: Case, setting: Setting) -> dict[str, Any]:
    """What a setting gives, or why it gives nothing."""
    if DEVICE.type == "cuda":
        # What the setting before has left: compiled layers and their modules hold one another.
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    make: Callable[..., Any] = Decode if case.kind == "decode" else Update
    try:
        seconds = rounds(make(case, setting).run, min(case.num_rounds, 2 if case.kind == "decode" else 5))
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}
    except RuntimeError as error:  # torch.compile's errors are of many kinds of it; other settings may still run
        return {"failed": str(error)[:300]}
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None
    speed = case.num_tokens / seconds.median
    return {"tokens_per_second": speed, "step_seconds": seconds.all, "peak_memory_bytes": peak}


def main(arguments: list[str]) -> None:
    """Every setting of the case, until the parent has heard enough."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = case_named(arguments[0])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for setting in settings_of(case):
        for way in ways(case, setting):
            found = tried(case, way)
            answers.write(json.dumps({"setting": way, "versions": versions, **found}) + "\n")
            if "out_of_memory" not in found:
                break


if __name__ == "__main__":
    main(sys.argv[1:])
