"""How devices are arranged and what is sharded over them."""

from dataclasses import dataclass

from r1jax.config.errors import at_least, require


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    mesh_data: int = 1
    """Devices over which whole copies of the model split the batch."""

    mesh_fsdp: int = -1
    """Devices over which the batch and, by zero_stage, the state are split; -1 means all that are left over."""

    mesh_context: int = 1
    """Reserved for splitting sequences; only 1 works today."""

    mesh_tensor: int = 1
    """Devices over which each layer's matrices are split; must divide the model's query heads."""

    zero_stage: int = 3
    """What is sharded: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""

    def __post_init__(self) -> None:
        at_least("mesh_data", self.mesh_data, 1, "use mesh_fsdp: -1 for the devices left over")
        at_least("mesh_tensor", self.mesh_tensor, 1, "1 means no tensor parallelism")
        fsdp = self.mesh_fsdp
        require(fsdp == -1 or fsdp >= 1, "mesh_fsdp", "-1 or x >= 1", fsdp, "-1 takes the devices left over")
        advice = "the context axis is reserved: split over mesh_fsdp or mesh_tensor"
        require(self.mesh_context == 1, "mesh_context", "1", self.mesh_context, advice)
        advice = "0 is plain data parallel, 3 shards everything"
        require(0 <= self.zero_stage <= 3, "zero_stage", "0, 1, 2 or 3", self.zero_stage, advice)

    @property
    def data_shards(self) -> int | None:
        """Data-parallel shards (the W of batch sizes), or None where the number of devices decides."""
        return None if self.mesh_fsdp == -1 else self.mesh_data * self.mesh_fsdp
