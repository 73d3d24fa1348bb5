"""How the forward passes of a run are run, as the recipe and the devices say."""

from r1jax.config import RunConfig
from r1jax.config.errors import need
from r1jax.models.attention.backends import BACKENDS, Backend, choose, device_of, make_attend, why_not
from r1jax.models.config import DecoderConfig
from r1jax.models.execution import Execution
from r1jax.models.transformer import RematPolicy
from r1jax.sharding.constraints import make_constrain
from r1jax.sharding.mesh import BATCH_AXES
from r1jax.training.state import StateLayout


def remat_of(config: RunConfig) -> RematPolicy:
    """What the backward pass recomputes."""
    return config.model.remat_policy if config.model.gradient_checkpointing else "dots"


def backend_of(config: RunConfig, decoder: DecoderConfig, layout: StateLayout) -> Backend:
    """The attention that attn_implementation names, or the fastest there is; raises UserError for one that the devices
    cannot run. Looks at the devices and holds nothing on them."""
    device = device_of(layout.mesh.devices.flat[0])
    about = (device, config.model.compute_dtype, decoder.head_dim)
    asked = config.model.attn_implementation
    for backend in BACKENDS:
        if backend == asked:
            if reason := why_not(backend, *about):
                advice = "null takes the fastest that runs"
                raise need("attn_implementation", "one that runs on these devices", backend, f"{reason}; {advice}")
            return backend
    return choose(*about)


def execution_of(config: RunConfig, decoder: DecoderConfig, layout: StateLayout) -> Execution:
    """The run's; raises `UserError` as `backend_of` does."""
    backend = backend_of(config, decoder, layout)
    return Execution(
        dtype=config.model.compute_dtype,
        remat=remat_of(config),
        backend=backend,
        attend=make_attend(backend, layout.mesh, BATCH_AXES),
        constrain=make_constrain(layout.mesh, layout.specs),
        mesh=layout.mesh,
        loss_chunk=config.model.loss_chunk_size,
    )
