"""On a CPU, linear layers that read their weight each time: vLLM's own are blind to new weights.

vLLM 0.32 packs a CPU layer's weight into a oneDNN handler once and empties the parameter. Loading again then raises, or
(`reload_weights`) answers 200 and leaves log-probabilities that are those of no weights at all: off by 0.28 on
SmolLM2-135M. Its private function is replaced, so only in versions that this was tried with.
"""

from typing import Any

TRIED = ("0.32.0",)


def vllm_version() -> str:
    """The server's, without what stands behind a plus."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def read_weights_each_time() -> None:
    """Replaces the packing where the platform is a CPU; raises RuntimeError for a vLLM that it was not written for."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if vllm_version() not in TRIED or not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError(
            f"vllm: need {' or '.join(TRIED)} on a CPU, got {vllm_version()}; its linear layers pack their weights and "
            "r1jax/vllm_plugin/cpu_linear.py knows how to stop only those versions from doing so"
        )
    utils.dispatch_cpu_unquantized_gemm = _read_each_time


def _read_each_time(layer: Any, remove_weight: bool) -> None:
    """In the place of vLLM's function of these arguments."""
    del remove_weight  # the parameter stays: it is what is loaded into and read
    layer.cpu_linear = _linear()


def packed_layers(model: Any) -> list[str]:
    """Names of the model's layers that would not see new weights."""
    return [
        name for name, layer in model.named_modules() if getattr(layer, "cpu_linear", None) not in (None, _linear())
    ]


def _linear() -> Any:
    import torch

    return torch.nn.functional.linear
