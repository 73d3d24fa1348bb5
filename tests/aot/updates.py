"""Prints the modelled table of docs/performance.md: bench.gpu's updates, as the TPU compiler plans them for one chip.

make aot-table
"""

import dataclasses
import importlib.metadata
import sys
from typing import Any

import jax

from bench.gpu.cases import Case, Setting, case_named
from bench.gpu.r1jax_side import batch_of
from r1jax import optimizer
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.attention.backends import make_attend
from r1jax.models.execution import Execution
from r1jax.models.flops import peak_flops
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.sft import make_nll
from r1jax.objectives.statistics import make_statistics
from r1jax.objectives.surrogate import Surrogate
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import lay_out
from r1jax.training.step import make_train_step
from tests.aot.steps import chip

CASES = (
    ("qwen3-0.6b sft 1x8k", Setting()),
    ("qwen3-0.6b sft 1x8k", Setting(remat="attention")),
    ("qwen3-0.6b grpo 1x8k of 8 documents", Setting()),
    ("qwen2.5-1.5b sft 1x8k", Setting()),
    ("qwen2.5-1.5b sft 1x8k", Setting(remat="attention")),
    ("qwen2.5-1.5b sft 1x32k", Setting(remat="attention")),
    ("qwen2.5-1.5b sft 1x32k", Setting(remat="full")),
)
CHIP = "v5p"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modelled:
    """What the compiler says of an update; nothing here was run."""

    state_bytes: int
    """State and batch."""
    temporary_bytes: int
    """What else the step needs while it runs."""


def compile_update(case: Case, setting: Setting, device: Any) -> Modelled:
    """The step that a run jits on one chip, in bfloat16, with splash attention."""
    optim = OptimizerConfig(learning_rate=1e-4, lr_scheduler_type="constant")
    layout = lay_out(case.decoder, optim, make_mesh(MeshConfig(), [device]), zero_stage=0)
    how = Execution(
        dtype=case.dtype,
        remat=setting.remat,
        backend="splash",
        attend=make_attend("splash"),
        constrain=make_constrain(layout.mesh, layout.specs),
        mesh=layout.mesh,
    )
    loss: Any = make_nll(case.decoder, how)
    if case.kind == "grpo":
        loss = make_policy_loss(make_statistics(case.decoder, how), Surrogate())
    step: Any = make_train_step(loss, optim, optimizer.make_schedule(optim, 1), layout)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.batch), batch_of(case)
    )
    # As runs in bfloat16 have it: the kernel's compiler takes no other precision for bfloat16 operands.
    with jax.default_matmul_precision("default"):
        compiled = step.lower(layout.abstract, batch).compile()
    # Its account of bytes is left out: it is the same whatever is computed again, as if a loop's body ran once.
    memory = compiled.memory_analysis()
    return Modelled(state_bytes=memory.argument_size_in_bytes, temporary_bytes=memory.temp_size_in_bytes)


def main() -> None:
    """The table in Markdown on stdout."""
    jax.config.update("jax_platforms", "cpu")
    device = chip(CHIP)
    peak = peak_flops(device.device_kind)
    titles = (
        "update",
        "remat",
        "state GiB",
        "temporary GiB",
        "TFLOP of the mathematics",
        "ms at the peak",
    )
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "libtpu"))
    _say(f"Modelled for one {device.device_kind}, {versions}\n")
    _say("| " + " | ".join(titles) + " |")
    _say("|" + "---|" * len(titles))
    for name, setting in CASES:
        case = case_named(name)
        found = compile_update(case, setting, device)
        flops = case.flops_per_token * case.num_tokens
        cells = [
            name, setting.remat, f"{found.state_bytes / 2**30:.1f}", f"{found.temporary_bytes / 2**30:.1f}",
            f"{flops / 1e12:.0f}", f"{1e3 * flops / peak:.0f}" if peak else "-",
        ]  # fmt: skip
        _say("| " + " | ".join(cells) + " |")


def _say(line: str) -> None:
    """A case compiles for minutes: each line is seen when it is there."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
