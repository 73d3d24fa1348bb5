"""transformers' model in a plain torch loop: HF's default fused AdamW, clipping, sdpa attention, bfloat16 autocast."""

import resource
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.cases import Case
from bench.side import LEARNING_RATE, MAX_GRAD_NORM, tokens_of


class TransformersSide:
    """The step that HF's Trainer does, without its bookkeeping."""

    def __init__(self, case: Case, num_threads: int):
        torch.set_num_threads(num_threads)
        torch.manual_seed(0)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fields = dict(case.hf_config)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        self._model = model.to(self._device).train()
        if case.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._optimizer = torch.optim.AdamW(self._model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
        self._tokens = torch.from_numpy(tokens_of(case)).long().to(self._device)
        self._autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=case.compute_dtype == "bfloat16")
        start = time.perf_counter()
        self.run(1)
        self.prepare_seconds = time.perf_counter() - start

    def run(self, num_steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(num_steps):
            self._optimizer.zero_grad(set_to_none=True)
            with self._autocast:
                loss = self._model(input_ids=self._tokens, labels=self._tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRAD_NORM)
            self._optimizer.step()
        return loss.item()  # waits for the device

    def peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def device(self) -> str:
        return torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
