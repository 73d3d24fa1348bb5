"""Who samples, and where the vLLM server is: its keys are read only with rollout_engine vllm."""

from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import at_least, require


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    rollout_engine: Literal["jax", "vllm"] = "jax"
    """Who samples: the embedded engine or a vLLM server; not given, use_vllm decides."""

    use_vllm: bool = False
    """open-r1's switch: true means rollout_engine vllm unless rollout_engine is given."""

    vllm_mode: Literal["server", "colocate"] = "server"
    """A server of its own, or one that shares the trainer's devices."""

    vllm_server_base_url: str | None = None
    """Address of the server such as http://host:8000, or several with commas between; null: of host and port."""

    vllm_server_host: str = "0.0.0.0"
    """Host of the server; 0.0.0.0, on which TRL's listens, means this one."""

    vllm_server_port: int = 8000
    """Port of the server."""

    vllm_server_timeout: float = 240.0
    """Seconds to wait for the server to come up."""

    vllm_request_timeout: float | None = None
    """Seconds until one request for completions must be answered; null: 600, or 0.1 a token where that is more."""

    vllm_verify_steps: int | None = None
    """Compare the server's log-probabilities with the trainer's again every so many steps; null: when it is needed."""

    rollout_async_depth: int = 0
    """Generations drawn ahead while the trainer trains, with older weights: 0 (none) or 1."""

    vllm_gpu_memory_utilization: float = 0.3
    """Part of the device's memory that a colocated server may take; 0 < x <= 1."""

    vllm_tensor_parallel_size: int = 1
    """Devices over which a colocated server splits the model."""

    vllm_guided_decoding_regex: str | None = None
    """Regular expression that completions must match; null means free text."""

    def __post_init__(self) -> None:
        port = self.vllm_server_port
        require(1 <= port <= 65535, "vllm_server_port", "1 <= x <= 65535", port, "8000 is the default")
        timeout = self.vllm_server_timeout
        require(timeout > 0, "vllm_server_timeout", "x > 0", timeout, "it is a number of seconds")
        seconds = self.vllm_request_timeout
        require(seconds is None or seconds > 0, "vllm_request_timeout", "x > 0", seconds, "it is a number of seconds")
        at_least("vllm_verify_steps", self.vllm_verify_steps, 1, "1 compares after each push; null when it is needed")
        depth = self.rollout_async_depth
        require(depth in (0, 1), "rollout_async_depth", "0 or 1", depth, "1 draws the next generation meanwhile")
        part = self.vllm_gpu_memory_utilization
        require(0 < part <= 1, "vllm_gpu_memory_utilization", "0 < x <= 1", part, "it is a part of the memory")
        at_least("vllm_tensor_parallel_size", self.vllm_tensor_parallel_size, 1, "1 means one device")

    @property
    def server_urls(self) -> tuple[str, ...]:
        """The addresses of the servers."""
        if self.vllm_server_base_url is not None:
            return tuple(url.strip() for url in self.vllm_server_base_url.split(",") if url.strip())
        host = "127.0.0.1" if self.vllm_server_host == "0.0.0.0" else self.vllm_server_host
        return (f"http://{host}:{self.vllm_server_port}",)
