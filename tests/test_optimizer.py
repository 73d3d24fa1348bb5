import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import optimizer
from r1jax.config.optimizer import OptimizerConfig
from r1jax.models.families import decoder_config, tensor_names
from r1jax.optimizer import make_schedule

CONSTANT: dict[str, Any] = {"lr_scheduler_type": "constant"}


def jitted(config: OptimizerConfig, num_steps: int = 100):
    """update(gradients, state, params) of this configuration."""
    return jax.jit(functools.partial(optimizer.update, config, make_schedule(config, num_steps)))


def random_tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 5), "bias": (5,)}
    linear = {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    norm = {"scale": jnp.asarray(scale * rng.normal(size=7), jnp.float32)}
    return {"layers": {"q": linear, "norm": norm}, "embed": {"embedding": norm["scale"][:, None] * linear["bias"]}}


def relative_error(one, other) -> float:
    return float(np.linalg.norm(np.asarray(one) - other) / np.linalg.norm(other))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_adamw_follows_torch(max_grad_norm):
    """Ten steps of torch's AdamW, clipping and transformers' linear schedule, 1e-6 in norm after each step. Gradient
    norms alternate around 1 and 20; torch divides by norm + 1e-6, we by the norm: a millionth when clipping at 1, and
    Adam's quotient takes most of that out again."""
    import torch
    import transformers

    config = OptimizerConfig(
        learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=max_grad_norm, warmup_steps=3
    )
    params = random_tree(0)
    names = ["kernel", "bias", "scale", "embedding"]
    tree_def = jax.tree.structure(params)
    paths = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert sorted(paths) == sorted(names)
    tensors = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in jax.tree.leaves(params)]
    groups = [
        {"params": [t for t, name in zip(tensors, paths, strict=True) if name in which], "weight_decay": decay}
        for which, decay in ((("kernel", "embedding"), 0.1), (("bias", "scale"), 0.0))
    ]
    torch_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    scheduler = transformers.get_scheduler("linear", torch_optimizer, num_warmup_steps=3, num_training_steps=20)

    update, state = jitted(config, 20), optimizer.init(config, params)
    clipped = 0
    for step in range(10):
        gradients = random_tree(step + 1, 3.0 if step % 2 else 0.01)
        params, state, metrics = update(gradients, state, params)
        for tensor, gradient in zip(tensors, jax.tree.leaves(gradients), strict=True):
            tensor.grad = torch.tensor(np.asarray(gradient))
        norm = torch.nn.utils.clip_grad_norm_(tensors, max_grad_norm or math.inf)
        clipped += bool(max_grad_norm and norm > max_grad_norm)
        torch_optimizer.step()
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-6)
        np.testing.assert_allclose(metrics["learning_rate"], scheduler.get_last_lr()[0], rtol=1e-6)
        scheduler.step()
        for leaf, tensor in zip(jax.tree.leaves(params), tensors, strict=True):
            assert relative_error(leaf, tensor.detach().numpy()) <= 1e-6
    assert clipped == (5 if max_grad_norm else 0)
    assert jax.tree.structure(params) == tree_def and int(state["count"]) == 10
    mu = [torch_optimizer.state[tensor]["exp_avg"].numpy() for tensor in tensors]
    assert max(map(relative_error, jax.tree.leaves(state["mu"]), mu)) <= 2e-6


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_decay_groups_are_those_of_transformers(family):
    """Trainer.get_decay_parameter_names on a model with every bias that the family has."""
    import transformers

    hf = transformers.AutoConfig.for_model(
        family,
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        **({} if family == "qwen2" else {"attention_bias": True}),
        **({"mlp_bias": True} if family == "llama" else {}),
    )
    model = transformers.AutoModelForCausalLM.from_config(hf)
    # The method reads nothing of its Trainer.
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
    assert theirs < {name for name, _ in model.named_parameters()}

    names = tensor_names(decoder_config(hf.to_dict()))
    tree: dict = {}
    for name in names:
        node = tree
        for key in name.path[:-1]:
            node = node.setdefault(key, {})
        node[name.path[-1]] = jnp.zeros(())
    flags = {
        tuple(key.key for key in path): flag
        for path, flag in jax.tree_util.tree_leaves_with_path(optimizer.decayed(tree))
    }
    ours = {
        name.hf.format(layer=layer) for name in names for layer in range(2 if name.stacked else 1) if flags[name.path]
    }
    assert ours == theirs


SCHEDULES = [
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 0.75}),
]


@pytest.mark.parametrize("warmup", [{}, {"warmup_ratio": 0.11}, {"warmup_steps": 7}])
@pytest.mark.parametrize(("kind", "given"), SCHEDULES)
def test_schedule_is_that_of_transformers(kind, given, warmup):
    """Each of 50 steps to a millionth of the peak; 0.11 x 50 is rounded up to 6."""
    import torch
    import transformers

    config = OptimizerConfig(learning_rate=3e-3, lr_scheduler_type=kind, lr_scheduler_kwargs=given, **warmup)
    counts = jnp.arange(51)
    ours = jax.vmap(make_schedule(config, 50))(counts)
    num_warmup_steps = {"warmup_ratio": 6, "warmup_steps": 7}.get(next(iter(warmup), ""), 0)
    torch_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    scheduler = transformers.get_scheduler(
        kind, torch_optimizer, num_warmup_steps, 50, scheduler_specific_kwargs=given or None
    )
    theirs = []
    for _ in counts:
        theirs.append(scheduler.get_last_lr()[0])
        torch_optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-9)


def test_warmup_by_hand():
    """Ratio 0.1 of 20 steps is 2: rates 0 and half the peak, then down to 0 over the other 18."""
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1), 20)
    rates = [float(schedule(jnp.asarray(count))) for count in (0, 1, 2, 11, 20)]
    assert rates == [0.0, 0.5, 1.0, 0.5, 0.0]
    # warmup_ratio is not read where warmup_steps is given.
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.9, warmup_steps=2), 20)
    assert float(schedule(jnp.asarray(1))) == 0.5


LEAN: dict[str, Any] = {"optim": "paged_adamw_8bit", "max_grad_norm": 0.0, **CONSTANT}


def test_lean_state_takes_two_bytes_a_parameter():
    """bfloat16 mu and a row and a column of float32 for each matrix of a stack, in place of 8 bytes; matrices with a
    side under 128 keep a whole second moment."""
    params = {
        "mlp": {"kernel": jnp.zeros((3, 256, 512)), "bias": jnp.zeros((3, 512))},
        "narrow": {"kernel": jnp.zeros((64, 512))},
    }
    state = optimizer.init(OptimizerConfig(**LEAN), params)
    assert set(state) == {"mu", "nu_row", "nu_col", "nu", "count"}
    moments = {name: state[name]["mlp"]["kernel"] for name in ("mu", "nu_row", "nu_col", "nu")}
    assert {leaf.shape for leaf in moments.values()} == {(3, 256, 512), (3, 256), (3, 512), (1,)}
    assert moments["mu"].dtype == jnp.bfloat16
    assert sum(leaf.nbytes for leaf in moments.values()) <= 2.2 * 3 * 256 * 512
    assert state["nu"]["narrow"]["kernel"].shape == (64, 512)
    usual = optimizer.init(OptimizerConfig(), params)
    assert set(usual) == {"mu", "nu", "count"}
    assert usual["mu"]["mlp"]["kernel"].nbytes + usual["nu"]["mlp"]["kernel"].nbytes == 8 * 3 * 256 * 512


def test_lean_steps_by_hand():
    """A vector, whose second moment is not factored: nu is Adam's after its bias correction, so 1 step of g gives
    nu = g^2 and a whole learning rate; the second gives (b2 g1^2 + g2^2) / (1 + b2), and mu is an average of
    quotients, kept in bfloat16 (8 bits: 1/256)."""
    config = OptimizerConfig(learning_rate=0.1, **LEAN)
    params = {"norm": {"scale": jnp.zeros(3)}}
    update, state = jitted(config), optimizer.init(config, params)
    first, second = np.asarray([1.0, -2.0, 5.0]), np.asarray([3.0, 2.0, -0.5])
    params, state, _ = update({"norm": {"scale": jnp.asarray(first, jnp.float32)}}, state, params)
    np.testing.assert_allclose(params["norm"]["scale"], -0.1 * np.sign(first), rtol=1e-6)
    np.testing.assert_allclose(state["nu"]["norm"]["scale"], first**2, rtol=1e-6)

    before = np.asarray(params["norm"]["scale"])
    params, state, _ = update({"norm": {"scale": jnp.asarray(second, jnp.float32)}}, state, params)
    nu = (0.999 * first**2 + second**2) / 1.999
    np.testing.assert_allclose(state["nu"]["norm"]["scale"], nu, rtol=1e-5)
    mu = (0.9 * 0.1 * np.sign(first) + 0.1 * second / np.sqrt(nu)) / (1 - 0.9**2)
    np.testing.assert_allclose(params["norm"]["scale"] - before, -0.1 * mu, rtol=2 / 256)


def test_lean_factors_are_exact_for_rank_one():
    """|gradient| = row x column: the product of the factors is the second moment itself, and the first update its
    sign. 130 x 140, since a side under 128 is not factored."""
    config = OptimizerConfig(learning_rate=0.1, **LEAN)
    rng = np.random.default_rng(0)
    gradient = jnp.asarray(np.outer(rng.normal(size=130), rng.normal(size=140)), jnp.float32)
    params = {"q": {"kernel": jnp.zeros((130, 140))}}
    after, _, _ = jitted(config)({"q": {"kernel": gradient}}, optimizer.init(config, params), params)
    np.testing.assert_allclose(after["q"]["kernel"], -0.1 * np.sign(gradient), rtol=1e-4)


def test_lean_decays_like_the_other():
    """A zero gradient leaves only decay, 1 - rate * decay, and none on the bias."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, optim="adamw_8bit", **CONSTANT)
    params = {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, _, _ = jitted(config)(zeros, optimizer.init(config, params), params)
    np.testing.assert_allclose(after["q"]["kernel"], 0.95, rtol=1e-6)
    assert after["q"]["bias"].tolist() == [1.0] * 4


def test_lean_learns_about_as_fast():
    """Linear regression, 160 inputs to 130 outputs: after 60 steps both have lost most, the lean one within 1.3 x."""
    rng = np.random.default_rng(0)
    inputs, truth = rng.normal(size=(256, 160)), rng.normal(size=(160, 130))
    x, y = jnp.asarray(inputs, jnp.float32), jnp.asarray(inputs @ truth / 160**0.5, jnp.float32)

    def loss(params):
        return jnp.mean((x @ params["q"]["kernel"] - y) ** 2)

    def final(optim: str) -> float:
        config = OptimizerConfig(learning_rate=3e-3, optim=optim, **CONSTANT)  # pyright: ignore[reportArgumentType]
        params = {"q": {"kernel": jnp.zeros((160, 130))}}
        carry = params, optimizer.init(config, params)

        def step(carry, _):
            params, state = carry
            after, state, _ = optimizer.update(config, make_schedule(config, 60), jax.grad(loss)(params), state, params)
            return (after, state), None

        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=60))(carry)
        return float(loss(params))

    start, usual, lean = float(jnp.mean(y**2)), final("adamw_torch"), final("adamw_8bit")
    assert usual < 0.3 * start
    assert lean < 1.3 * usual
