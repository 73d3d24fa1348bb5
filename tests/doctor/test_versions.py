from importlib.metadata import requires

from r1jax.doctor.findings import is_bad
from r1jax.doctor.versions import check_versions, judge_versions, lower_bounds, numbers


def test_this_environment_is_well():
    assert not is_bad(check_versions())


def test_the_bounds_are_those_of_the_package():
    bounds = lower_bounds(requires("r1jax") or [])
    assert {"jax", "flax", "transformers", "orbax-checkpoint"} <= bounds.keys()
    assert lower_bounds(["math-verify[antlr]~=0.9.0", "a-b >=1.2", 'c>=3; extra == "gpu"', "d"]) == {
        "math-verify": "0.9.0",
        "a-b": "1.2",
    }


def test_numbers():
    assert numbers("535.104.05") == (535, 104, 5)
    assert numbers("0.12.0.dev3") == (0, 12, 0)
    assert numbers("none") == ()


def test_what_is_missing_or_too_old_is_bad():
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.9.1", "grain": None}
    well, *bad = judge_versions(versions, {"jax": "0.10.2", "flax": "0.12.8", "grain": "0.2"})
    assert well.found == "jax 0.10.2, jaxlib 0.10.2"
    assert [(one.check, one.found, one.verdict, one.advice) for one in bad] == [
        ("flax", "0.9.1", "bad", "pip install 'flax>=0.12.8'"),
        ("grain", "not installed", "bad", "pip install 'grain>=0.2'"),
    ]


def test_jax_and_jaxlib_go_together():
    _, bad = judge_versions({"jax": "0.12.0.1", "jaxlib": "0.10.2"}, {})
    assert (bad.check, bad.verdict) == ("jaxlib", "bad")
    assert not is_bad(judge_versions({"jax": "0.12.0.1", "jaxlib": "0.12.0"}, {}))
