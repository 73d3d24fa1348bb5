"""The peer: a transformers model in a plain torch loop, at the best of its settings.

`python -m bench.gpu.torch_side CASE` prints a JSON line for every setting that it has measured. Float32 weights and
fused AdamW under bfloat16 autocast, as transformers' Trainer has them; cross entropy in chunks of tokens, so that no
[tokens, vocabulary] array is whole on this side either; scaled_dot_product_attention's flash kernel where rows are one
document, flex attention or a mask where they are several.
"""
# torch is not installed where types are checked without it.
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false

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
"""Tokens whose logits exist at one time."""


def settings_of(case: Case) -> list[dict[str, Any]]:
    """In the order in which they are likely to run at all within the time."""
    if case.kind == "decode":
        return [{"attention": "sdpa"}]
    attentions = ["sdpa"] if case.documents == 1 else ["sdpa", "flex_attention"]
    compiled = (False, True) if DEVICE.type == "cuda" else (False,)
    return [
        {"attention": attention, "compile": compiles, "gradient_checkpointing": checkpoints}
        for attention in attentions
        for compiles in compiled
        for checkpoints in ((True, False) if case.row_length > 8192 else (False, True))
        # flex attention is a template that torch.compile fills in.
        if compiles or attention == "sdpa"
    ]


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


def logprobs_of(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of all tokens, a chunk's logits at a time, made again in the backward pass."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(chunk_terms, part, head, ids, use_reentrant=False) for part, ids in parts])


class Update:
    """A step's work."""

    def __init__(self, case: Case, setting: dict[str, Any]):
        torch.manual_seed(0)
        self._case = case
        self._model = make_model(case, setting["attention"], torch.float32).train()
        if setting["gradient_checkpointing"]:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        if setting["compile"]:
            # A layer at a time: the whole model takes minutes and is hardly faster.
            for layer in self._model.model.layers:
                layer.compile()
        fused = DEVICE.type == "cuda"
        self._optimizer = torch.optim.AdamW(self._model.parameters(), 1e-4, weight_decay=0.0, fused=fused)
        fields = {name: torch.from_numpy(leaf).long().to(DEVICE) for name, leaf in packed(case).items()}
        self._tokens, self._positions = fields["tokens"], fields["positions"]
        self._trained = (self._positions[:, 1:] > 0).reshape(-1)
        # As r1jax's side has them: those of a policy that knows nothing.
        generator = torch.Generator(DEVICE).manual_seed(1)
        near = torch.randn(self._trained.shape, generator=generator, device=DEVICE)
        self._old = -torch.log(torch.tensor(float(case.decoder.vocab_size), device=DEVICE)) + 0.05 * near
        self._advantages = torch.randn(self._trained.shape, generator=generator, device=DEVICE)
        self._autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.dtype == "bfloat16")

    def run(self, count: int) -> None:
        """So many steps, done."""
        for _ in range(count):
            self._optimizer.zero_grad(set_to_none=True)
            with self._autocast:
                positions = {} if self._case.documents == 1 else {"position_ids": self._positions}
                hidden = self._model.model(input_ids=self._tokens, use_cache=False, **positions).last_hidden_state
                flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
                found = logprobs_of(flat, self._model.lm_head.weight, self._tokens[:, 1:].reshape(-1))
            loss = self._loss(found)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
        wait()

    def _loss(self, logprobs: torch.Tensor) -> torch.Tensor:
        if self._case.kind == "sft":
            terms = -logprobs
        else:
            ratio = torch.exp(logprobs - self._old)
            terms = -torch.min(ratio * self._advantages, ratio.clamp(0.8, 1.2) * self._advantages)
        return (terms * self._trained).sum() / self._trained.sum()


class Decode:
    """transformers' generate, a key/value cache and sdpa."""

    def __init__(self, case: Case, setting: dict[str, Any]):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        self._model = make_model(case, setting["attention"], dtype).eval()
        shape = (case.documents, case.prompt_length)
        prompts = torch.randint(case.decoder.vocab_size, shape, device=DEVICE)
        self._prompts = prompts.repeat_interleave(case.rows // case.documents, dim=0)
        self._new = case.row_length

    def run(self, count: int) -> None:
        for _ in range(count):
            with torch.inference_mode():
                self._model.generate(
                    self._prompts, attention_mask=torch.ones_like(self._prompts), max_new_tokens=self._new,
                    min_new_tokens=self._new, do_sample=True, top_k=0, pad_token_id=0,
                )  # fmt: skip
        wait()


def wait() -> None:
    """Until the device is idle."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str]) -> None:
    """Every setting of the case, until the parent has heard enough."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = case_named(arguments[0])
    make: Callable[..., Any] = Decode if case.kind == "decode" else Update
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for setting in settings_of(case):
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any]
        try:
            seconds = rounds(make(case, setting).run, min(case.num_rounds, 2 if case.kind == "decode" else 5))
            found = {"tokens_per_second": case.num_tokens / seconds.median, "step_seconds": seconds.all}
        except torch.OutOfMemoryError as error:
            found = {"out_of_memory": str(error).splitlines()[0]}
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None
        answers.write(json.dumps({"setting": setting, "versions": versions, **found, "peak_memory_bytes": peak}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
