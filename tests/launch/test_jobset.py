"""launch/jobset.yaml: its fields are those of the two APIs, its pods the processes of one run. No GKE ran it."""

import itertools
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1jax.sharding.environment import Processes, find_processes
from tests.launch.cluster_stubs import PYTHON, ROOT, environment, install, recorded

JOBSET = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]
(TRAINER,) = POD["containers"]

# A field's type; a tuple lists the values there are; a list is a list of its one item; "NAME" is another table. From
# jobset/api/jobset/v1alpha2/jobset_types.go (0.8) and Kubernetes' batch/v1 and core/v1, as far as the file may need.
JOBSET_SCHEMA: dict[str, Any] = {
    "JobSet": {"apiVersion": ("jobset.x-k8s.io/v1alpha2",), "kind": ("JobSet",), "metadata": "Meta", "spec": "Spec"},
    "Meta": {"name": str, "namespace": str, "labels": dict, "annotations": dict},
    "Spec": {
        "replicatedJobs": ["ReplicatedJob"], "network": "Network", "successPolicy": "SuccessPolicy",
        "failurePolicy": "FailurePolicy", "startupPolicy": dict, "suspend": bool, "coordinator": dict,
        "managedBy": str, "ttlSecondsAfterFinished": int,
    },
    "ReplicatedJob": {"name": str, "replicas": int, "template": "JobTemplate", "dependsOn": list},
    "Network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "SuccessPolicy": {"operator": ("All", "Any"), "targetReplicatedJobs": [str]},
    "FailurePolicy": {"maxRestarts": int, "restartStrategy": ("Recreate", "BlockingRecreate"), "rules": ["Rule"]},
    "Rule": {
        "name": str, "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
        "onJobFailureReasons": [("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy")],
        "targetReplicatedJobs": [str],
    },
    "JobTemplate": {"metadata": "Meta", "spec": "Job"},
    "Job": {
        "completionMode": ("Indexed", "NonIndexed"), "parallelism": int, "completions": int, "backoffLimit": int,
        "activeDeadlineSeconds": int, "podFailurePolicy": "PodFailurePolicy", "template": "PodTemplate",
    },
    "PodFailurePolicy": {"rules": ["PodRule"]},
    "PodRule": {
        "action": ("FailJob", "FailIndex", "Ignore", "Count"), "onExitCodes": "ExitCodes", "onPodConditions": list,
    },
    "ExitCodes": {"containerName": str, "operator": ("In", "NotIn"), "values": [int]},
    "PodTemplate": {"metadata": "Meta", "spec": "Pod"},
    "Pod": {
        "restartPolicy": ("Never",), "terminationGracePeriodSeconds": int, "nodeSelector": dict, "tolerations": list,
        "containers": ["Container"], "volumes": ["Volume"], "serviceAccountName": str, "hostNetwork": bool,
    },
    "Container": {
        "name": str, "image": str, "workingDir": str, "command": [str], "args": [str], "env": ["Env"],
        "ports": ["Port"], "resources": {"limits": dict, "requests": dict}, "volumeMounts": ["Mount"],
    },
    "Env": {"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str, "apiVersion": str}}},
    "Port": {"containerPort": int, "name": str, "protocol": ("TCP", "UDP")},
    "Mount": {"name": str, "mountPath": str, "readOnly": bool, "subPath": str},
    "Volume": {"name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str, "sizeLimit": str}},
}  # fmt: skip
REQUIRED = {
    "JobSet": {"apiVersion", "kind", "metadata", "spec"},
    "ReplicatedJob": {"name", "template"},
    "Rule": {"name", "action"},
    "Job": {"template"},
    "Container": {"name", "image"},
    "ExitCodes": {"operator", "values"},
    "Env": {"name"},
    "Mount": {"name", "mountPath"},
    "Volume": {"name"},
}


def faults(value: Any, kind: Any, path: str = "") -> list[str]:
    """Where the value is not what the schema says."""
    if isinstance(kind, str):
        missing = REQUIRED.get(kind, set()) - set(value if isinstance(value, dict) else ())
        return [f"{path}: no {name}" for name in sorted(missing)] + faults(value, JOBSET_SCHEMA[kind], path)
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return [f"{path}: not a mapping"]
        unknown = [f"{path}.{name}: unknown" for name in value if name not in kind]
        inside = [faults(value[name], kind[name], f"{path}.{name}") for name in value if name in kind]
        return [*unknown, *itertools.chain.from_iterable(inside)]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        inside = [faults(item, kind[0], f"{path}[{index}]") for index, item in enumerate(value)]
        return list(itertools.chain.from_iterable(inside))
    if isinstance(kind, tuple):
        return [] if value in kind else [f"{path}: {value!r} is none of {kind}"]
    return [] if type(value) is kind else [f"{path}: {value!r} is no {kind.__name__}"]


def test_its_fields_are_those_of_the_apis():
    assert faults(JOBSET, "JobSet") == []


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3, ".spec.failurePolicy.maxRestart: unknown"),
        (("spec", "failurePolicy", "maxRestarts"), "3", ".spec.failurePolicy.maxRestarts: '3' is no int"),
        (("apiVersion",), "jobset.x-k8s.io/v1", ".apiVersion: 'jobset.x-k8s.io/v1' is none of"),
        (("spec", "replicatedJobs"), [{"name": "a"}], ".spec.replicatedJobs[0]: no template"),
    ],
)
def test_the_check_can_fail(place: tuple[str, ...], value: object, fault: str):
    changed = yaml.safe_load(yaml.safe_dump(JOBSET))
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    assert any(found.startswith(fault) for found in faults(changed, "JobSet"))


def test_all_start_again_but_not_for_bad_input():
    assert JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert JOB["backoffLimit"] == 0 and POD["restartPolicy"] == "Never"
    (rule,) = JOB["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [2]}}
    (reaction,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert (reaction["action"], reaction["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert POD["terminationGracePeriodSeconds"] >= 120


def pod_environment(index: int) -> dict[str, str]:
    """What Kubernetes sets for the pod of this index: references to its annotations, then $(VARIABLE) of what stands
    before."""
    annotations = {
        "jobset.sigs.k8s.io/jobset-name": JOBSET["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": JOBSET["spec"]["replicatedJobs"][0]["name"],
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    values = {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    for entry in TRAINER["env"]:
        if "value" in entry:
            values[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], entry["value"])
        else:
            path = re.fullmatch(r"metadata\.annotations\['(.*)'\]", entry["valueFrom"]["fieldRef"]["fieldPath"])
            assert path is not None
            values[entry["name"]] = annotations[path[1]]
    return values


def test_every_pod_is_a_process_of_the_run():
    count = JOB["parallelism"]
    assert JOB["completions"] == count and JOB["completionMode"] == "Indexed"
    assert JOBSET["spec"]["network"]["enableDNSHostnames"] is True
    job = JOBSET["spec"]["replicatedJobs"][0]
    assert job["replicas"] == 1
    # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>, which is the jobset's name
    name = JOBSET["metadata"]["name"]
    first = f"{name}-{job['name']}-0-0.{name}:8476"
    assert {port["containerPort"] for port in TRAINER["ports"]} == {8476}
    for index in range(count):
        assert find_processes(pod_environment(index)) == Processes(
            coordinator=first, num_processes=count, process_id=index, source="environment"
        )


def start_pod(tmp_path: Path, **more: str) -> subprocess.Popen[bytes]:
    """The container's command as Kubernetes starts it."""
    programs = install(tmp_path / "bin", **{"python-stub": PYTHON})
    environ = environment(programs, tmp_path / "record", **pod_environment(1), **more)
    return subprocess.Popen([*TRAINER["command"], *TRAINER["args"]], env=environ, cwd=tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_the_container_ends_as_the_training_does(tmp_path: Path, code: int):
    assert start_pod(tmp_path, STUB_CODE=str(code)).wait(timeout=60) == code
    call = recorded(tmp_path / "record")[0]
    assert call == ["python-stub", "-m", "r1jax.launch", *TRAINER["args"][2:]]
    assert os.path.exists(ROOT / TRAINER["args"][2])


def test_a_pod_that_is_told_to_stop_is_not_taken_for_done(tmp_path: Path):
    waits = tmp_path / "waits"
    pod = start_pod(tmp_path, STUB_WAITS=str(waits))
    try:
        deadline = time.monotonic() + 30
        while not waits.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(timeout=30) == 143
    finally:
        pod.kill()
