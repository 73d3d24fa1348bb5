"""Low-rank adapters (LoRA, Hu et al. 2021): y = x W + s (x A) B, with W frozen and A, B trained.

An adapter is a tree of `lora_a` [L, in, r] and `lora_b` [L, r, out] under the paths of the kernels that they stand
beside. Joined with the base, which has `lora_scale` [L] there, it makes a model that every forward pass, sampler and
export reads as it reads one without: what computes with it folds the scale in (`folded`), what wants plain weights
merges it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from r1jax.config.lora import LINEAR_MODULES, LoraConfig
from r1jax.models.config import DecoderConfig
from r1jax.models.parameters import Params, abstract_params

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
SITES: dict[str, tuple[str, str]] = {
    name: ("attention" if name[0] in "qkvo" else "mlp", name.removesuffix("_proj")) for name in LINEAR_MODULES
}
"""Where a layer's tree has each module of Hugging Face's names."""

Dropout = Callable[[str, Array], Array]
"""(the projection's name, its input) -> what of the input the factors see."""


class Adapted(NamedTuple):
    """A kernel and what is beside it, as one leaf of its shape."""

    kernel: Any
    lora_a: Any
    lora_b: Any
    lora_scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return self.kernel.shape

    @property
    def sharding(self) -> Any:
        """The kernel's."""
        return self.kernel.sharding

    def merged(self) -> Float[Array, "*layers D out"]:
        """kernel + scale A B, of a stack of layers or of one, in the kernel's dtype."""
        scale = self.lora_scale[..., None, None].astype(jnp.float32)
        factors = (leaf.astype(jnp.float32) for leaf in (self.lora_a, self.lora_b))
        added = scale * jnp.matmul(*factors, precision=jax.lax.Precision.HIGHEST)
        return (self.kernel.astype(jnp.float32) + added).astype(self.kernel.dtype)


def abstract_adapter(config: DecoderConfig, lora: LoraConfig) -> Params:
    """The adapter's tree as `jax.ShapeDtypeStruct`s; allocates nothing."""
    return jax.eval_shape(lambda: init_adapter(config, lora, jax.random.key(0)))


def init_adapter(config: DecoderConfig, lora: LoraConfig, key: PRNGKeyArray) -> Params:
    """A fresh adapter, which changes nothing: B is 0. A is uniform within 1 / sqrt(in), as PEFT draws it (Kaiming's
    with a = sqrt(5)); a module's numbers do not depend on which others are adapted."""
    layers: Params = {}
    for number, (name, (part, module)) in enumerate(SITES.items()):
        if name not in lora.modules:
            continue
        depth, width, out = abstract_params(config)["layers"][part][module]["kernel"].shape
        shape, bound = (depth, width, lora.lora_r), width**-0.5
        drawn = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        layers.setdefault(part, {})[module] = {A: drawn, B: jnp.zeros((depth, lora.lora_r, out), jnp.float32)}
    return {"layers": layers}


@functools.cache
def num_parameters(config: DecoderConfig, lora: LoraConfig) -> int:
    """Of the adapter."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_adapter(config, lora)))


def join(base: Params | None, adapter: Params) -> Params:
    """One tree with the leaves of both, which share none; the adapter itself where there is no base."""
    return adapter if base is None else _joined(base, adapter)


def _joined(one: Params, other: Params) -> Params:
    both = {name: _joined(one[name], other[name]) for name in one if name in other}
    return {**one, **other, **both}


def part_of(tree: Any, like: Params) -> Any:
    """The leaves of a nested dict that stand where `like` has one."""
    return {name: part_of(tree[name], inner) if isinstance(inner, dict) else tree[name] for name, inner in like.items()}


def with_scale(base: Params, lora: LoraConfig, make: Callable[[int], Any]) -> Params:
    """The base with make(number of layers) as the scale of each adapted module."""
    layers = dict(base["layers"])
    for name in lora.modules:
        part, module = SITES[name]
        depth = layers[part][module]["kernel"].shape[0]
        layers[part] = {**layers[part], module: {**layers[part][module], SCALE: make(depth)}}
    return {**base, "layers": layers}


def scales(lora: LoraConfig, num_layers: int) -> Float[Array, " L"]:
    """The scale of each layer, all alike."""
    return jnp.full((num_layers,), lora.scaling, jnp.float32)


def folded(params: Params) -> Params:
    """The tree with each scale multiplied into its B, in B's dtype, and gone."""
    return _at_adapted(params, _folded)


def _folded(node: Params) -> Params:
    rest = {name: leaf for name, leaf in node.items() if name != SCALE}
    scale = node[SCALE][..., None, None]
    return {**rest, B: (node[B].astype(scale.dtype) * scale).astype(node[B].dtype)}


def merge(params: Params) -> Params:
    """The tree with each adapted kernel as one matrix; of stacked layers or of one."""
    return _at_adapted(params, _merged)


def _merged(node: Params) -> Params:
    rest = {name: leaf for name, leaf in node.items() if name not in Adapted._fields}
    return {**rest, "kernel": adapted(node).merged()}


def adapted(node: Params) -> Adapted:
    """A projection's kernel with its factors."""
    return Adapted(*(node[name] for name in Adapted._fields))


def _at_adapted(tree: Params, change: Callable[[Params], Params]) -> Params:
    if SCALE in tree:
        return change(tree)
    return {name: _at_adapted(inner, change) if isinstance(inner, dict) else inner for name, inner in tree.items()}


def undropped(name: str, x: Array) -> Array:
    """The input itself: evaluation, scoring and sampling drop nothing."""
    del name
    return x


def make_dropout(key: PRNGKeyArray, rate: float) -> Dropout:
    """Drops each entry with probability `rate` and scales what stays by 1 / (1 - rate); each projection draws its own
    mask, as PEFT's modules do."""
    numbers = {module: number for number, (_, module) in enumerate(SITES.values())}

    def drop(name: str, x: Array) -> Array:
        stays = jax.random.bernoulli(jax.random.fold_in(key, numbers[name]), 1 - rate, x.shape)
        return jnp.where(stays, x / (1 - rate), jnp.zeros((), x.dtype))

    return drop


def sites_of(adapter: Params) -> Iterator[tuple[str, Params]]:
    """Each adapted module by Hugging Face's name, with its factors."""
    for name, (part, module) in SITES.items():
        if module in adapter["layers"].get(part, {}):
            yield name, adapter["layers"][part][module]
