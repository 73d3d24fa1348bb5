"""A listener that answers as a vLLM server with r1jax's worker extension does, but for a model behind it."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from tests.rollout.http_server import HANG, completion


@dataclasses.dataclass
class VllmLike:
    """Its `answer` is a listener's; what it is may be changed while it runs."""

    folder: Path
    """Where weights are left for it."""
    version: int | None = None
    owner: str = ""
    dtype: str = "float32"
    sizes: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"vocab_size": 40, "hidden_size": 32, "num_layers": 2}
    )
    gone: bool = False
    """Whether it answers nothing, as a frozen one."""
    slow: bool = False
    """Whether its completions never come."""
    instance: str = "one"
    calls: list[str] = dataclasses.field(default_factory=list)
    """Methods called but for looks at its state."""
    probes: int = 0
    """Completions of 16 tokens, by which it is compared with the trainer."""

    def answer(self, path: str, body: Any, number: int) -> Any:
        if self.gone:
            return HANG
        if path == "/collective_rpc":
            return {"results": [self._called(body["method"], *body["args"])]}
        if path == "/v1/completions":
            return self._completion(path, body, number)
        return {"data": [{"id": "policy"}], "success": True}

    def _called(self, method: str, *args: Any) -> dict[str, Any]:
        if method == "r1jax_state":
            about = {
                "version": self.version,
                "owner": self.owner,
                "torn": False,
                "sync_dir": str(self.folder),
                "vllm": "0.0",
            }
            more = {"dtype": self.dtype, "logprobs_mode": "processed_logprobs", "max_model_len": 64}
            return {"ok": True, **about, **more, **self.sizes}
        if method == "r1jax_digest":
            return {"ok": True, "sha256": hashlib.sha256((self.folder / args[0]).read_bytes()).hexdigest()}
        self.calls.append(method)
        if method == "r1jax_prepare":
            self.owner = args[2]
        if method == "r1jax_apply":
            self.version = args[0]
        return {"ok": True}

    def _completion(self, path: str, body: Any, number: int) -> Any:
        if "allowed_token_ids" in body:
            return {"choices": [{"token_ids": body["allowed_token_ids"], "finish_reason": "stop"}]}
        if body.get("logprobs") == 5:
            gaps = {f"token_id:{token}": -token / body["temperature"] for token in range(5)}
            return {"choices": [{"logprobs": {"top_logprobs": [gaps]}}]}
        if body["max_tokens"] == 16:
            self.probes += 1
            drawn = {"token_ids": [3] * 16, "logprobs": {"token_logprobs": [-1.0] * 16}, "finish_reason": "length"}
            return {"choices": [{"index": 0, **drawn}]}
        return HANG if self.slow else completion(path, body, number)
