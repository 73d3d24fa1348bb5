"""What the environment says about the processes of a run: a table of environments, each with its answer."""

import subprocess
import sys

import pytest

from r1jax.config.errors import UserError
from r1jax.sharding.environment import Processes, find_processes

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]-ib,login1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
JOBSET = {"JOBSET_NAME": "r1", "REPLICATED_JOB_NAME": "trainer", "JOB_COMPLETION_INDEX": "2"}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "s0-0:8080", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
OURS = {"JAX_COORDINATOR_ADDRESS": "node0:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        {"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": "", "JAX_COORDINATOR_ADDRESS": ""},
        SLURM | {"JAX_NUM_PROCESSES": "1"},  # a step of independent runs
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # an sbatch script outside of srun
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODELIST": "n[1-4]"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"},  # an indexed job of independent runs
    ],
)
def test_alone(environ):
    assert find_processes(environ) is None


@pytest.mark.parametrize(
    ("environ", "place", "source"),
    [
        (OURS, ("node0:8476", 4, 3), "environment"),
        (OURS | SLURM, ("node0:8476", 4, 3), "environment"),
        (OURS | {"JAX_COORDINATOR_ADDRESS": "[fe80::1%eth0]:80"}, ("[fe80::1%eth0]:80", 4, 3), "environment"),
        (OURS | {"JAX_COORDINATOR_ADDRESS": "a.b", "JAX_COORDINATOR_PORT": "6002"}, ("a.b:6002", 4, 3), "environment"),
        # 61440 + 70001 % 4096
        (SLURM, ("gpu007-ib:61809", 5, 3), "Slurm"),
        (SLURM | {"SLURM_STEP_NODELIST": "n1,n2"}, ("n1:61809", 5, 3), "Slurm"),
        (SLURM | {"SLURM_STEP_NODELIST": "rack[2,4]n[10-11]"}, ("rack2n10:61809", 5, 3), "Slurm"),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, ("gpu007-ib:99", 5, 3), "Slurm"),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.7:99"}, ("10.0.0.7:99", 5, 3), "Slurm"),
        (SLURM | {"JAX_NUM_PROCESSES": "5"}, ("gpu007-ib:61809", 5, 3), "Slurm"),
        (JOBSET | {"JAX_NUM_PROCESSES": "3"}, ("r1-trainer-0-0.r1:8476", 3, 2), "JobSet"),
        (TPU, ("t-0.svc:8482", 2, 1), "TPU"),
        (TPU | JOBSET, ("t-0.svc:8482", 2, 1), "TPU"),
        (TPU | SLICES, ("s0-0:8482", 6, 5), "TPU"),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_ID": "0"}, ("a:8482", 2, 0), "TPU"),
        # two processes that a task of Slurm starts for itself
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
            | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:5", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            ("127.0.0.1:5", 2, 0),
            "environment",
        ),
    ],
)  # fmt: skip
def test_a_place_among_others(environ, place, source):
    coordinator, num_processes, process_id = place
    assert find_processes(environ) == Processes(
        coordinator=coordinator, num_processes=num_processes, process_id=process_id, source=source
    )


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, r"JAX_NUM_PROCESSES: need a whole number >= 1, got 'two'; "),
        ({"JAX_NUM_PROCESSES": "0"}, r"JAX_NUM_PROCESSES: need a whole number >= 1, got '0'; "),
        (OURS | {"JAX_PROCESS_ID": "-1"}, r"JAX_PROCESS_ID: need a whole number >= 0, got '-1'; "),
        (OURS | {"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID: need 0 <= x < 4 \(JAX_NUM_PROCESSES\), got 4; "),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "1"}, r"JAX_PROCESS_ID: need 0 <= x < 1 "),
        (OURS | {"JAX_COORDINATOR_ADDRESS": "node0"}, r"JAX_COORDINATOR_ADDRESS: need host:port, .* got 'node0'; "),
        (OURS | {"JAX_COORDINATOR_ADDRESS": "http://a:1"}, r"JAX_COORDINATOR_ADDRESS: need host:port, "),
        (OURS | {"JAX_COORDINATOR_ADDRESS": ""}, r"JAX_COORDINATOR_ADDRESS: need to be set when JAX_NUM_PROCESSES is"),
        (OURS | {"JAX_PROCESS_ID": ""}, r"JAX_PROCESS_ID: need to be set when JAX_COORDINATOR_ADDRESS is, got nothing"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, r"JAX_NUM_PROCESSES: need to be set when JAX_COORDINATOR_ADDRESS is"),
        ({"JAX_PROCESS_ID": "1"}, r"JAX_COORDINATOR_ADDRESS: need to be set when JAX_PROCESS_ID is"),
        (SLURM | {"JAX_NUM_PROCESSES": "4"}, r"JAX_NUM_PROCESSES: need 5, .* that Slurm started, got 4; unset it"),
        (SLURM | {"SLURM_PROCID": "5"}, r"JAX_PROCESS_ID: need 0 <= x < 5 "),
        (
            OURS | SLURM | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"},
            r"JAX_PROCESS_ID: need 1, the number that Slurm gave this process, got 3; unset it",
        ),
        (JOBSET, r"JAX_NUM_PROCESSES: need to be set in a JobSet, got nothing; "),
        (JOBSET | {"JAX_NUM_PROCESSES": "2"}, r"JAX_PROCESS_ID: need 0 <= x < 2 "),
    ],
)
def test_what_cannot_be_right(environ, line):
    with pytest.raises(UserError, match="^" + line):
        find_processes(environ)


def test_a_launcher_that_asks_does_not_load_jax():
    asks = "import sys, r1jax.sharding.environment; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asks]).returncode == 0
