"""Which processes share the run, as the environment says. docs/launch.md has the table.

Knows nothing of JAX: a launcher reads it and must not wait for JAX.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from r1jax.config.errors import need, shown

ADDRESS, COUNT, RANK = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PORT = "JAX_COORDINATOR_PORT"
"""The coordinator's port, as JAX calls it, where the address has none or the cluster gives only a host."""

_JOBSET_PORT, _TPU_PORT = 8476, 8482


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The place of this process among the others; there are at least two."""

    coordinator: str
    """host:port where process 0 listens."""

    num_processes: int
    """How many there are."""

    process_id: int
    """This one's number, from 0."""

    source: str
    """Who said so: "environment" (all of it in JAX_*), "Slurm", "JobSet" or "TPU"."""


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What one source says; None where it does not know."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    source: str


def find_processes(environ: Mapping[str, str]) -> Processes | None:
    """What the environment says: JAX_* first, what they leave out from Slurm, JobSet or TPU variables; None when alone.

    A TPU VM, whose workers know each other from the metadata server only, counts as alone here; `initialize_processes`
    leaves it to JAX. Raises `UserError` for what is incomplete or contradicts itself.
    """
    own = _explicit(environ)
    if own.num_processes == 1:
        _check_rank(own.process_id or 0, 1)
        return None
    cluster = _slurm(environ) or _tpu(environ) or _jobset(environ)
    said = own if cluster is None else _merged(own, cluster)
    values = {ADDRESS: said.coordinator, COUNT: said.num_processes, RANK: said.process_id}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == 3:
        return None
    if missing:
        given = next(name for name in values if name not in missing)
        reason = f"when {given} is" if said.source == "environment" else f"in a {said.source}"
        raise need(missing[0], f"to be set {reason}", "nothing", "set it, or start with launch/local.sh")
    assert said.coordinator is not None and said.num_processes is not None and said.process_id is not None
    _check_rank(said.process_id, said.num_processes)
    return Processes(
        coordinator=said.coordinator,
        num_processes=said.num_processes,
        process_id=said.process_id,
        source=said.source,
    )


def _check_rank(process_id: int, num_processes: int) -> None:
    if process_id >= num_processes:
        raise need(RANK, f"0 <= x < {num_processes} ({COUNT})", str(process_id), "number the processes from 0")


def _merged(own: _Said, cluster: _Said) -> _Said:
    """JAX_* where they are set, else the cluster."""
    if None not in (own.coordinator, own.num_processes, own.process_id):
        _check_same_rank(own, cluster)
        return own
    if own.num_processes and cluster.num_processes and own.num_processes != cluster.num_processes:
        rule = f"{cluster.num_processes}, the number of processes that {cluster.source} started"
        raise need(COUNT, rule, str(own.num_processes), f"unset it, or set {ADDRESS} and {RANK} as well")
    return _Said(
        coordinator=own.coordinator or cluster.coordinator,
        num_processes=own.num_processes or cluster.num_processes,
        process_id=cluster.process_id if own.process_id is None else own.process_id,
        source=cluster.source,
    )


def _check_same_rank(own: _Said, cluster: _Said) -> None:
    """Raises when each task of the cluster got the same JAX_PROCESS_ID, as an `export` in a batch script does.

    Processes that a task starts for itself, all on its host, may count anew.
    """
    assert own.coordinator is not None
    local = own.coordinator.startswith(("127.", "localhost:", "[::1]"))
    if not local and own.num_processes == cluster.num_processes and own.process_id != cluster.process_id:
        rule = f"{cluster.process_id}, the number that {cluster.source} gave this process"
        raise need(RANK, rule, str(own.process_id), "unset it, then each process takes its own")


def _explicit(environ: Mapping[str, str]) -> _Said:
    return _Said(
        coordinator=_address(environ),
        num_processes=number(environ, COUNT, 1),
        process_id=number(environ, RANK, 0),
        source="environment",
    )


def _address(environ: Mapping[str, str]) -> str | None:
    address, port = environ.get(ADDRESS, ""), environ.get(PORT, "")
    if address and port and not re.search(r"(^|[^:]|\]):\d+$", address):
        address = f"{address}:{port}"
    if address and not re.fullmatch(r"([^\s:/\[\]]+|\[[\da-fA-F:.%\w]+\]):\d{1,5}", address):
        raise need(ADDRESS, "host:port, an IPv6 address in brackets", shown(address), "for instance node0:8476")
    return address or None


def number(environ: Mapping[str, str], name: str, low: int) -> int | None:
    """The variable as a whole number, None where it is not set or empty."""
    text = environ.get(name, "").strip()
    if text and not (text.isdecimal() and int(text) >= low):
        raise need(name, f"a whole number >= {low}", shown(text), "set it, or unset it when the process runs alone")
    return int(text) if text else None


def _slurm(environ: Mapping[str, str]) -> _Said | None:
    """The step's tasks; the port follows from the job's number, as in JAX's own detection.

    An sbatch script outside of srun has SLURM_NTASKS and a SLURM_PROCID as well, but runs alone: it has no step.
    """
    nodes, count = environ.get("SLURM_STEP_NODELIST"), number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if not nodes or count is None or count == 1:
        return None
    port = number(environ, PORT, 1) or 61440 + (number(environ, "SLURM_JOB_ID", 0) or 0) % 4096
    return _Said(
        coordinator=f"{_first_node(nodes)}:{port}",
        num_processes=count,
        process_id=number(environ, "SLURM_PROCID", 0),
        source="Slurm",
    )


def _first_node(nodes: str) -> str:
    """The first host of Slurm's short form: `gpu[007-009,12]-ib,login1` begins with gpu007-ib."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0]) if found else nodes


def _jobset(environ: Mapping[str, str]) -> _Said | None:
    """The pods of a JobSet's job, whose first one has a stable name (launch/jobset.yaml hands the names in).

    https://jobset.sigs.k8s.io: <jobset>-<replicated job>-<job index>-<pod index>.<subdomain, the jobset's name>.
    """
    jobset, job = environ.get("JOBSET_NAME"), environ.get("REPLICATED_JOB_NAME")
    rank = number(environ, "JOB_COMPLETION_INDEX", 0)
    if not jobset or not job or rank is None:
        return None
    port = number(environ, PORT, 1) or _JOBSET_PORT
    return _Said(
        coordinator=f"{jobset}-{job}-0-0.{jobset}:{port}", num_processes=None, process_id=rank, source="JobSet"
    )


def _tpu(environ: Mapping[str, str]) -> _Said | None:
    """The workers of a TPU slice on GKE, or of several slices, counted as JAX counts them (cloud_tpu_cluster.py)."""
    workers = (environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    rank = number(environ, "TPU_WORKER_ID", 0)
    slices = number(environ, "MEGASCALE_NUM_SLICES", 1) or 1
    if rank is None or len(workers) * slices == 1:
        return None
    host = (environ.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    return _Said(
        coordinator=f"{host}:{number(environ, PORT, 1) or _TPU_PORT}",
        num_processes=len(workers) * slices,
        process_id=rank + len(workers) * (number(environ, "MEGASCALE_SLICE_ID", 0) or 0),
        source="TPU",
    )
