"""Where the time of an update goes: `python -m bench.gpu.parts CASE` prints a JSON line for each part.

Each part is a program of its own, forward and backward, of the case's shapes: all layers' attention, all layers' matrix
products, the loss over the vocabulary, the optimizer; then the whole step. What the step takes beyond their sum is
gaps, norms, rotations and what is computed again. Beside each stands its floor: its operations at the measured
product's speed, or its bytes at the copy's, whichever is longer; the ceilings are measured in the same process.
"""

import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.cases import Case, Setting, case_named
from bench.gpu.ceilings import seconds_of
from bench.gpu.r1jax_side import batch_of, execution, measure_update
from r1jax import optimizer, runtime
from r1jax.config.mesh import MeshConfig
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.flops import mean_visible_keys
from r1jax.objectives.cross_entropy import token_logprobs_and_entropy, weighted_nll
from r1jax.sharding.mesh import make_mesh
from r1jax.training.state import fresh_params, lay_out, start_state

Part = tuple[str, float, float, float]
"""(name, seconds, floating point operations, bytes)"""


def attention_part(case: Case, setting: Setting) -> Part:
    """All layers' attention."""
    config, dtype = case.decoder, jnp.dtype(case.dtype)
    layout = lay_out(config, OptimizerConfig(), make_mesh(MeshConfig(), jax.devices()[:1]), zero_stage=0)
    attend = execution(case, setting, layout).attend
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch_of(case))
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    qkv = [
        jax.random.normal(jax.random.key(i), (case.rows, case.row_length, n, config.head_dim), dtype)
        for i, n in enumerate(heads)
    ]

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        return jax.grad(
            lambda *given: jnp.sum(attend(given[0], given[1], given[2], rows.layout).astype(jnp.float32)), (0, 1, 2)
        )(q, k, v)

    per_key = 12 * config.num_heads * config.head_dim
    flops = per_key * mean_visible_keys(case.lengths) * case.num_tokens * config.num_layers
    # q, k, v and the output, read or written once each way, with their gradients.
    moved = 2 * 2 * sum(leaf.nbytes for leaf in (qkv[0], *qkv)) * config.num_layers
    return "attention", config.num_layers * seconds_of(both, *qkv), flops, moved


def products_part(case: Case) -> Part:
    """All layers' matrix products, and their two each on the way back."""
    config, dtype = case.decoder, jnp.dtype(case.dtype)
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, inner), (hidden, inner)]
    shapes.append((inner, hidden))
    seconds = flops = moved = 0.0
    for shape in shapes:
        x = jax.random.normal(jax.random.key(0), (case.num_tokens, shape[0]), dtype)
        w = jax.random.normal(jax.random.key(1), shape, dtype)
        g = jax.random.normal(jax.random.key(2), (case.num_tokens, shape[1]), dtype)
        seconds += seconds_of(jax.jit(lambda x, w, g: (x @ w, g @ w.T, x.T @ g)), x, w, g)
        flops += 6 * case.num_tokens * shape[0] * shape[1]
        moved += 3 * (x.nbytes + w.nbytes + g.nbytes)
    layers = config.num_layers
    return "matrix products", layers * seconds, layers * flops, layers * moved


def loss_part(case: Case, setting: Setting) -> Part:
    """Hidden states to gradients."""
    config, dtype = case.decoder, jnp.dtype(case.dtype)
    shape = (case.rows, case.row_length)
    hidden = jax.random.normal(jax.random.key(0), (*shape, config.hidden_size), dtype)
    vectors = 0.02 * jax.random.normal(jax.random.key(1), (config.vocab_size, config.hidden_size), dtype)
    targets = jax.random.randint(jax.random.key(2), shape, 0, config.vocab_size)
    weights = jnp.full(shape, 1 / case.num_tokens)

    def loss(hidden: Any, vectors: Any) -> Any:
        given = (hidden, vectors.T, targets)
        if case.kind == "sft":
            return weighted_nll(*given, weights, setting.loss_chunk)[0]
        return jnp.sum(weights * token_logprobs_and_entropy(*given, setting.loss_chunk)[0])

    seconds = seconds_of(jax.jit(jax.grad(loss, (0, 1))), hidden, vectors)
    flops = 6 * case.num_tokens * config.hidden_size * config.vocab_size
    return "vocabulary loss", seconds, flops, 3 * vectors.nbytes + 3 * hidden.nbytes


def optimizer_part(case: Case, setting: Setting) -> Part:
    """The update of all parameters."""
    optim = OptimizerConfig(optim=setting.optim, learning_rate=1e-4, lr_scheduler_type="constant")  # type: ignore[arg-type]
    layout = lay_out(case.decoder, optim, make_mesh(MeshConfig(), jax.devices()[:1]), zero_stage=0)
    state = start_state(fresh_params(case.decoder, 0, layout), optim, layout)
    schedule = optimizer.make_schedule(optim, 1)
    held = [state.params, state.optimizer]

    @jax.jit
    def update(params: Any, moments: Any) -> Any:
        return optimizer.update(optim, schedule, params, moments, params)[:2]  # a gradient is as good as another

    donated = jax.jit(update, donate_argnums=(0, 1))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))

    def step() -> Any:
        held[:] = donated(*held)
        return held

    # Parameters and moments are read and written, gradients are read.
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(held[0]))
    return "optimizer", seconds_of(step), 0.0, 2 * size + gradients


def main(arguments: list[str]) -> None:
    """The parts, the whole, and the ceilings that the floors stand on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case = case_named(arguments[0])
    runtime.configure(case.dtype)
    size = 8192 if jax.devices()[0].platform != "cpu" else 256
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (size * size * 4,), jnp.bfloat16)
    per_flop = seconds_of(jax.jit(jnp.matmul), a, a) / (2 * size**3)
    per_byte = seconds_of(jax.jit(jnp.negative), x) / (2 * x.nbytes)
    setting = case.settings[0]
    total = 0.0
    for part in (lambda: attention_part(case, setting), lambda: products_part(case), lambda: loss_part(case, setting),
                 lambda: optimizer_part(case, setting)):  # fmt: skip
        name, seconds, flops, moved = part()
        total += seconds
        floor = max(flops * per_flop, moved * per_byte)
        answers.write(json.dumps({"part": name, "seconds": seconds, "floor_seconds": floor}) + "\n")
    whole = measure_update(case, setting)
    seconds = case.num_tokens / whole["tokens_per_second"]
    answers.write(json.dumps({"part": "step", "seconds": seconds, "gaps_seconds": seconds - total}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
