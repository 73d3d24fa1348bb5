"""The compiler flags that a run sets, by platform, each with its reason.

A flag that the compiler does not know ends the process at its start, so all of them are tried by the tests
(`tests/test_xla_flags.py`, `tests/aot/test_xla_flags.py`), and none is set for a jax that has not been tested. What the
user sets stays. Left out on purpose: `xla_gpu_enable_pipelined_*`, which jax 0.10 accepts and ignores on GPUs
(https://github.com/openxla/xla/issues/44228) and which changed losses before (https://github.com/openxla/xla/pull/16953).
"""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass

from r1jax.config.errors import need, shown

FIRST_JAX, LAST_JAX = (0, 10), (0, 12)
"""The versions of jax between which, both included, the flags have been tried."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag, without its dashes."""

    name: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


VARIABLES = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
"""Where each platform's compiler looks."""

FLAGS: dict[str, tuple[Flag, ...]] = {
    "cpu": (),
    "gpu": (
        Flag(
            name="xla_gpu_enable_latency_hiding_scheduler",
            value="true",
            why="collectives run beside products; NVIDIA's JAX images set it, jaxlib 0.10 has it off",
        ),
        Flag(
            name="xla_gpu_all_gather_combine_threshold_bytes",
            value=str(128 * 2**20),
            why="a layer's weights are gathered in one piece (MaxText's value; the default is 30 MiB)",
        ),
        Flag(
            name="xla_gpu_reduce_scatter_combine_threshold_bytes",
            value=str(64 * 2**20),
            why="a layer's gradients are scattered in one piece (MaxText's value)",
        ),
        Flag(
            name="xla_gpu_all_reduce_combine_threshold_bytes",
            value=str(128 * 2**20),
            why="gradients of small layers are summed in one piece (MaxText's value)",
        ),
    ),
    # MaxText's flags for asynchronous all-gathers are v5e's defaults, and elsewhere libtpu 0.0.50 refuses them, because
    # they may give wrong results there (0.0.42 takes them without a word).
    "tpu": (),
}
DETERMINISTIC = Flag(name="xla_gpu_deterministic_ops", value="true", why="kernels that repeat bit by bit")


def add_flags(
    environ: MutableMapping[str, str], platforms: Iterable[str], jax_version: tuple[int, ...], *, deterministic: bool
) -> None:
    """Adds the platforms' flags to the environment's variables; must come before the compiler first looks."""
    if FIRST_JAX <= jax_version[:2] <= LAST_JAX:
        for platform in platforms:
            if flags := FLAGS.get(platform):
                variable = VARIABLES[platform]
                environ[variable] = with_flags(environ.get(variable, ""), flags)
    if deterministic:
        current = environ.get("XLA_FLAGS", "")
        if _is_file(current):
            advice = f"write {DETERMINISTIC} into it and set deterministic: false"
            raise need("XLA_FLAGS", "flags when deterministic is true", f"the file {shown(current)}", advice)
        environ["XLA_FLAGS"] = with_flags(current, [DETERMINISTIC])


def with_flags(current: str, flags: Iterable[Flag]) -> str:
    """The flags there are and those of ours that are not among them; a file's name stays as it is."""
    if _is_file(current):
        return current
    given = {word.lstrip("-").partition("=")[0] for word in current.split()}
    return " ".join([*current.split(), *(str(flag) for flag in flags if flag.name not in given)])


def _is_file(current: str) -> bool:
    """XLA takes a value without dashes for the name of a file with flags (xla/parse_flags_from_env.cc)."""
    return bool(current.strip()) and not current.strip().startswith("-")
