import pytest

from r1jax.doctor.processes import check_environment, judge_clocks

PLACE = {"JAX_COORDINATOR_ADDRESS": "n0.cluster:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_the_environment_as_found():
    (finding,) = check_environment(PLACE)
    assert finding.found == "process 1 of 2, coordinator n0.cluster:8476 (from: environment)"
    (finding,) = check_environment({})
    assert (finding.verdict, finding.found) == ("ok", "one: no variable says that there are others")


def test_half_an_environment_is_bad():
    (finding,) = check_environment({"JAX_NUM_PROCESSES": "2"})
    assert finding.verdict == "bad"
    assert finding.found.startswith("JAX_COORDINATOR_ADDRESS: need to be set when JAX_NUM_PROCESSES is")


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({"HTTP_PROXY": "http://p:1"}, True),
        ({"https_proxy": "http://p:1", "no_proxy": "localhost,n0"}, True),
        ({"http_proxy": "http://p:1", "no_proxy": "localhost, .cluster"}, False),
        ({"http_proxy": "http://p:1", "NO_PROXY": "n0.cluster"}, False),
        ({"http_proxy": "http://p:1", "no_proxy": "*"}, False),
        ({"http_proxy": ""}, False),
    ],
)
def test_proxies_that_would_get_the_coordinators_connections(variables: dict[str, str], warned: bool):
    findings = check_environment(PLACE | variables)
    assert [one.verdict for one in findings] == (["ok", "warn"] if warned else ["ok"])


def test_clocks():
    assert [one.verdict for one in judge_clocks([("0 on a", 100.0), ("1 on b", 101.5)])] == ["ok"]
    late, gone = judge_clocks([("0 on a", 100.0), ("1 on b", 97.0), ("2 on c", 100.0), ("3 on d", 200.0)])
    assert (late.check, late.verdict) == ("clock of 1 on b", "warn")
    assert (gone.check, gone.found, gone.verdict) == ("clock of 3 on d", "100.0 s apart", "bad")
