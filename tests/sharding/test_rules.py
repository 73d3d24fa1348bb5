import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.config.errors import UserError
from r1jax.config.mesh import MeshConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import abstract_params
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.rules import make_specs, optimizer_specs, shardings

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-6,
    rope_theta=1e4,
    qkv_bias=True,
)
FSDP, DATA_FSDP, FSDP_TENSOR = {"mesh_fsdp": 8}, {"mesh_data": 2, "mesh_fsdp": 4}, {"mesh_fsdp": 4, "mesh_tensor": 2}
LEAVES = {
    "embed": lambda tree: tree["embed"]["embedding"],
    "lm_head": lambda tree: tree["lm_head"]["kernel"],
    "q": lambda tree: tree["layers"]["attention"]["q"]["kernel"],
    "q bias": lambda tree: tree["layers"]["attention"]["q"]["bias"],
    "o": lambda tree: tree["layers"]["attention"]["o"]["kernel"],
    "gate": lambda tree: tree["layers"]["mlp"]["gate"]["kernel"],
    "down": lambda tree: tree["layers"]["mlp"]["down"]["kernel"],
    "norm": lambda tree: tree["layers"]["input_norm"]["scale"],
}
BOTH = ("fsdp", "data")
# [V, D]; [D, V]; [L, D, NH]; [L, NH]; [L, NH, D]; [L, D, F]; [L, F, D]; [L, D]: the largest dimension is cut, the
# first of equals, never the layers.
SPLIT = {
    "fsdp": [P("fsdp"), P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp"), P(None, None, "fsdp"),
             P(None, "fsdp"), P(None, "fsdp")],
    "fsdp, data": [P(BOTH), P(None, BOTH), P(None, BOTH), P(None, BOTH), P(None, BOTH), P(None, None, BOTH),
                   P(None, BOTH), P(None, BOTH)],
    # Heads, MLP width and vocabulary over tensor, which leaves the other dimension to fsdp; a bias has only one.
    "fsdp, tensor": [P("tensor", "fsdp"), P("fsdp", "tensor"), P(None, "fsdp", "tensor"), P(None, ("tensor", "fsdp")),
                     P(None, "tensor", "fsdp"), P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp"), P(None, "fsdp")],
    "tensor": [P("tensor"), P(None, "tensor"), P(None, None, "tensor"), P(None, "tensor"), P(None, "tensor"),
               P(None, None, "tensor"), P(None, "tensor"), P()],
    "": [P()] * 8,
}  # fmt: skip


def specs_of(shape, stage, config=CONFIG):
    mesh, heads = make_mesh(MeshConfig(**shape)), {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    return make_specs(abstract_params(config), mesh, stage, **heads)


def chosen(tree):
    return [pick(tree) for pick in LEAVES.values()]


@pytest.mark.parametrize(
    ("shape", "whole", "parameters", "state"),
    [
        (FSDP, "", "fsdp", "fsdp"),
        (DATA_FSDP, "", "fsdp", "fsdp, data"),
        (FSDP_TENSOR, "tensor", "fsdp, tensor", "fsdp, tensor"),
    ],
)
@pytest.mark.parametrize("stage", range(4))
def test_tables(shape, whole, parameters, state, stage):
    """The table in the module's docstring, leaf by leaf."""
    specs = specs_of(shape, stage)
    assert chosen(specs.params) == SPLIT[parameters if stage == 3 else whole]
    assert chosen(specs.gradients) == SPLIT[state if stage >= 2 else whole]
    assert chosen(specs.moments) == SPLIT[state if stage >= 1 else whole]
    assert chosen(specs.compute) == SPLIT[whole]


def cut_dims(spec: P) -> list[int]:
    return [dim for dim, names in enumerate(spec) if names is not None]


def test_moments_are_cut_where_parameters_are():
    """A hidden size that fsdp (4) divides and data x fsdp (8) does not: both then leave it for one that 8 divides."""
    specs = specs_of(DATA_FSDP, 3, dataclasses.replace(CONFIG, hidden_size=36))
    is_spec = {"is_leaf": lambda leaf: isinstance(leaf, P)}
    params, moments = (jax.tree.leaves(tree, **is_spec) for tree in (specs.params, specs.moments))
    assert list(map(cut_dims, params)) == list(map(cut_dims, moments))
    assert specs.params["layers"]["attention"]["q"]["kernel"] == P(None, None, "fsdp")
    assert specs.moments["layers"]["attention"]["q"]["kernel"] == P(None, None, BOTH)


def test_what_nothing_divides_stays_whole():
    specs = specs_of(FSDP, 3, dataclasses.replace(CONFIG, hidden_size=36))
    assert specs.params["layers"]["input_norm"]["scale"] == specs.moments["layers"]["input_norm"]["scale"] == P()
    assert specs.params["final_norm"]["scale"] == P()


def test_kv_heads_are_never_cut():
    """One kv head for two tensor shards: k and v stay whole there, and their free dimensions still go to fsdp."""
    specs = specs_of(FSDP_TENSOR, 3, dataclasses.replace(CONFIG, num_kv_heads=1, head_dim=8))
    for name in "kv":
        assert specs.compute["layers"]["attention"][name] == {"kernel": P(), "bias": P()}
        assert specs.params["layers"]["attention"][name]["kernel"] == P(None, "fsdp")
    assert specs.compute["layers"]["attention"]["q"]["kernel"] == P(None, None, "tensor")


@pytest.mark.parametrize(("change", "rule"), [
    ({"num_heads": 3, "num_kv_heads": 3}, "a divisor of the model's 3 query heads, got 2; lower it"),
    ({"vocab_size": 65}, "a divisor of the model's 65 token ids, got 2; lower it"),
])  # fmt: skip
def test_tensor_axis_that_does_not_fit_the_model(change, rule):
    with pytest.raises(UserError, match=f"^mesh_tensor: need {rule}"):
        specs_of(FSDP_TENSOR, 0, dataclasses.replace(CONFIG, **change))


def test_optimizer_state_follows_the_moments():
    """Counts and a factored second moment are whole; what has a parameter's shape is cut like it."""
    params = {"q": {"kernel": jnp.zeros((16, 24))}, "norm": {"scale": jnp.zeros(8)}}
    moments = {"q": {"kernel": P(None, "fsdp")}, "norm": {"scale": P("fsdp")}}
    rows = {"q": {"kernel": jnp.zeros(16)}, "norm": {"scale": jnp.zeros(8)}}
    specs = optimizer_specs({"mu": params, "nu_row": rows, "count": jnp.zeros(())}, params, moments)
    assert specs == {
        "mu": moments,
        "nu_row": {"q": {"kernel": P()}, "norm": {"scale": P("fsdp")}},
        "count": P(),
    }
    mesh = make_mesh(MeshConfig())
    assert shardings(mesh, specs)["mu"]["q"]["kernel"] == NamedSharding(mesh, P(None, "fsdp"))
