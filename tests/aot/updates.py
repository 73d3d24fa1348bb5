"""Prints the modelled tables of docs/performance.md: bench.gpu's updates, as the TPU compiler plans them for one chip.

make aot-table
"""

import dataclasses
import importlib.metadata
import math
import sys
from collections import Counter
from typing import Any

import jax

from bench.gpu.cases import Case, Setting, case_named
from bench.gpu.r1jax_side import batch_of
from r1jax import optimizer
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.attention.backends import make_attend
from r1jax.models.execution import Execution
from r1jax.models.flops import matmul_parameters, peak_flops
from r1jax.models.parameters import abstract_params
from r1jax.objectives.grpo import make_policy_loss
from r1jax.objectives.sft import make_nll
from r1jax.objectives.statistics import make_statistics
from r1jax.objectives.surrogate import Surrogate
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import lay_out
from r1jax.training.step import make_train_step
from tests.aot.cycles import PARTS as CODE_PARTS
from tests.aot.cycles import Program, Work
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
BYTES_PER_SECOND = 2765e9
"""Of the chip's memory, by its datasheet."""
OPERATIONS_PER_CYCLE = 2 * 8 * 128**2
"""Two cores multiply on four arrays of 128 x 128 each: with the peak they say what the estimates' cycle takes."""
MEMORY = ("state GiB", "temporary GiB", "TFLOP of the mathematics", "ms at the peak")
PARTS = (
    "mlp (floor)", "attention's products (floor)", "vocabulary (floor)", "optimizer (floor)", "attention's rest",
    "other", "sum", "attention's kernels, floor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modelled:
    """What the compiler says of an update; nothing here was run."""

    state_bytes: int
    """State and batch."""
    temporary_bytes: int
    """What else the step needs while it runs."""
    cycles: Counter[Work]
    """Estimates of the parts."""


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
    return Modelled(
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        cycles=Program(compiled.as_text()).cycles(),
    )


def floors(case: Case, peak: float) -> dict[str, float]:
    """Seconds that the parts take at least: products at the peak, each counted once; AdamW's seven passes over a
    float32 for every parameter at the memory's speed."""
    config, tokens = case.decoder, case.num_tokens
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = 6 * config.num_layers * config.hidden_size * tokens / peak
    sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
    return {
        "mlp": per_layer * 3 * config.intermediate_size,
        "attention": per_layer * 2 * (query + key),
        "vocabulary": 6 * config.hidden_size * config.vocab_size * tokens / peak,
        "optimizer": 7 * 4 * sum(sizes) / BYTES_PER_SECOND,
        "kernels": (case.flops_per_token - 6 * matmul_parameters(config)) * tokens / peak,
    }


def parts(case: Case, found: Modelled, peak: float) -> list[str]:
    """The cells below PARTS, in ms."""
    least = floors(case, peak)
    cycles = found.cycles
    unit = 1e3 * OPERATIONS_PER_CYCLE / peak
    whole = {part: unit * (cycles[Work(part, True)] + cycles[Work(part, False)]) for part in CODE_PARTS}
    products = unit * cycles[Work("attention", True)]
    cells = [(whole["mlp"], least["mlp"]), (products, least["attention"])]
    cells += [(whole[part], least[part]) for part in ("vocabulary", "optimizer")]
    named = sum(whole.values())
    total = unit * cycles.total()
    rest = [whole["attention"] - products, total - named, total, 1e3 * least["kernels"]]
    return [f"{value:.0f} ({1e3 * floor:.0f})" for value, floor in cells] + [f"{value:.0f}" for value in rest]


def main() -> None:
    """The tables in Markdown on stdout."""
    jax.config.update("jax_platforms", "cpu")
    device = chip(CHIP)
    peak = peak_flops(device.device_kind)
    assert peak, device.device_kind
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "libtpu"))
    _say(f"Modelled for one {device.device_kind}, {versions}\n")
    _heading(MEMORY)
    times = []
    for name, setting in CASES:
        case = case_named(name)
        found = compile_update(case, setting, device)
        flops = case.flops_per_token * case.num_tokens
        about = [name, setting.remat]
        memory = [found.state_bytes / 2**30, found.temporary_bytes / 2**30]
        cells = [f"{size:.1f}" for size in memory] + [f"{flops / 1e12:.0f}", f"{1e3 * flops / peak:.0f}"]
        _row(about + cells)
        times.append(about + parts(case, found, peak))
    _say("")
    _heading(PARTS)
    for cells in times:
        _row(cells)


def _heading(titles: tuple[str, ...]) -> None:
    _row(["update", "remat", *titles])
    _say("|" + "---|" * (2 + len(titles)))


def _row(cells: list[str]) -> None:
    _say("| " + " | ".join(cells) + " |")


def _say(line: str) -> None:
    """A case compiles for minutes: each line is seen when it is there."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
