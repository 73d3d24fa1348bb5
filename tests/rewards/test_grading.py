"""Real graders that hang, crash, swell and raise, in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from r1jax.config.errors import RunFailure
from r1jax.config.rewards import REWARD_NAMES, CodeRewardsConfig, RewardsConfig
from r1jax.rewards import process
from r1jax.rewards.grading import Graders
from r1jax.rewards.registry import make_rewards

ROOT = Path(__file__).parent.parent.parent
NAN = float("nan")


def counted(scores):
    return {name: count for name, count in scores.counts.items() if count}


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process ends within the time; one that nobody has reaped counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def read_pids(path: Path, seconds: float = 20) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        words = path.read_text().split() if path.exists() else []
        if len(words) == 2:
            return [int(word) for word in words]
        time.sleep(0.02)
    raise AssertionError(f"nothing in {path}")


def test_rewards_in_workers_are_those_of_the_functions(graders, score, said):
    names = [name for name in REWARD_NAMES if name not in ("code", "binary_code", "ioi_code", "cf_code")]
    rewards = make_rewards(RewardsConfig(reward_funcs=tuple(names)), CodeRewardsConfig())
    texts = [f"<think>\nFirst,{' x' * i}\n</think>\n<answer>\n\\boxed{{{i % 3}}}\n</answer>" for i in range(12)]
    given = {
        "prefills": [""] * 12,
        "group_ids": [i // 4 for i in range(12)],
        "completion_ids": [[1] * 1000 * i for i in range(12)],
    }
    columns = {"solution": ["$1$"] * 11 + ["forty"], "other": ["unread"] * 12, "language": [None] * 12}
    scores = score(graders(*names, timeout=10), texts, columns=columns, **given)
    expected = [reward.function(completions=said(*texts), **given, **columns) for reward in rewards]
    np.testing.assert_array_equal(scores.values, np.array(expected, dtype=float).T)
    assert scores.values.dtype == np.float64
    assert scores.seconds > 0
    assert counted(scores) == {
        f"rewards/{name}/none": np.isnan(scores.values[:, i]).sum()
        for i, name in enumerate(reward.name for reward in rewards)
        if np.isnan(scores.values[:, i]).any()
    }


BAD = [
    ("hang", "timeouts"),
    ("hang without threads", "timeouts"),
    ("stop", "timeouts"),
    ("exit", "crashes"),
    ("segfault", "crashes"),
    ("memory", "crashes"),
    ("system exit", "crashes"),
    ("raise", "errors"),
    ("nan", "errors"),
    ("input", "errors"),
    ("none", "none"),
]


@pytest.mark.parametrize(
    ("function", "text", "kind"),
    [
        *[("text_length", text, kind) for text, kind in BAD],
        ("one_by_one", "hang", "timeouts"),
        ("one_by_one", "none", "none"),
        ("slowly", "hang without threads", "timeouts"),
        ("slowly", "raise", "errors"),
    ],
)
def test_a_bad_sample_costs_its_own_reward(graders, score, function, text, kind):
    pool = graders(f"hostile_graders:{function}", "format")
    scores = score(pool, ["ab", text, "abc", "print"])
    np.testing.assert_array_equal(scores.values, [[2, 0], [NAN, 0], [3, 0], [1, 0]])
    expected = {f"rewards/{function}/{kind}": 1.0}
    if kind != "none" or function == "one_by_one":
        expected[f"rewards/{function}/batch_failures"] = 1.0
    assert counted(scores) == expected
    # the next step is as if nothing had happened
    scores = score(pool, ["ab"])
    np.testing.assert_array_equal(scores.values, [[2, 0]])
    assert counted(scores) == {}


def test_an_answer_that_stops_in_its_middle_stops_nobody(graders, score, monkeypatch):
    """As of a worker that is frozen while it writes."""
    monkeypatch.setattr(process, "_SECONDS_TO_SEND", 1)
    scores = score(graders("hostile_graders:one_by_one", workers=1, timeout=30.0), ["ab", "half an answer", "abc"])
    np.testing.assert_array_equal(scores.values, [[2], [NAN], [3]])
    assert scores.counts["rewards/one_by_one/crashes"] == 1 and scores.seconds < 25


def test_many_bad_samples_at_once(graders, score):
    texts = ["a", "hang", "b", "exit", "c", "raise", "d", "memory", "e", "segfault", "f"] * 2
    scores = score(graders("hostile_graders:one_by_one", workers=3), texts)
    good = np.array([len(text) == 1 for text in texts])
    np.testing.assert_array_equal(scores.values[:, 0], np.where(good, 1.0, NAN))
    name = "rewards/one_by_one"
    assert counted(scores) == {
        f"{name}/timeouts": 2,
        f"{name}/crashes": 6,
        f"{name}/errors": 2,
        f"{name}/batch_failures": 1,
    }


def test_a_pooled_reward_pools_what_is_left(graders, score, monkeypatch):
    # 9**9**9**9 keeps math-verify busy beyond the deadline; its length still counts in the pool
    slow = r"\boxed{9^{9^{9^{9}}}}"
    texts = [r"\boxed{6}", slow, r"\boxed{6}" + " " * (2 * len(slow) - 18) + r"\boxed{6}"]
    scores = score(graders("length", timeout=1.0), texts, columns={"solution": ["$6$"] * 3})
    span = len(texts[2]) - 9
    np.testing.assert_allclose(scores.values[:, 0], [0.5, NAN, 0.5 - span / span])
    assert counted(scores) == {"rewards/len_reward/timeouts": 1}


def test_a_hopeless_reward_ends(graders, score, monkeypatch):
    monkeypatch.setattr("r1jax.rewards.ledger.KILLS_IN_A_ROW", 3)
    scores = score(graders("hostile_graders:one_by_one", "format", workers=1, timeout=0.2), ["hang"] * 8)
    np.testing.assert_array_equal(scores.values, [[NAN, 0.0]] * 8)
    name = "rewards/one_by_one"
    assert counted(scores) == {f"{name}/timeouts": 3, f"{name}/given_up": 5, f"{name}/batch_failures": 1}


def test_users_functions_see_what_trl_gives_and_more(graders, score, tmp_path):
    scores = score(
        graders("hostile_graders:sees_everything"),
        ["a", "b"],
        prompts=["p", "q"],
        completion_ids=[[1], [2, 3]],
        prefills=["<think>\n", ""],
        group_ids=[0, 1],
        columns={"extra": [0.25, None]},
        trainer_state={"global_step": 7},
    )
    assert counted(scores) == {"rewards/sees_everything/none": 1}
    np.testing.assert_array_equal(scores.values, [[0.25], [NAN]])


def test_users_functions_have_the_batch_and_may_take_few_parameters(graders, score):
    columns = {"difficulty": [1, 2, 3], "unread": [0, 0, 0]}
    pool = graders("hostile_graders:batch_size", "hostile_graders:few_parameters", "hostile_graders:wrong_number")
    scores = score(pool, ["a", "b", "c"], columns=columns)
    np.testing.assert_array_equal(scores.values, [[3, 2, 1], [3, 4, 1], [3, 6, 1]])
    assert counted(scores) == {"rewards/wrong_number/batch_failures": 1}


def test_workers_are_where_the_parent_is_and_leave_the_accelerator_alone(graders, score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = score(graders("hostile_graders:where_am_i"), ["a"], columns={"file": [str(tmp_path / "file")]})
    assert scores.values.tolist() == [[0.0]]
    assert (tmp_path / "file").read_text().split() == [str(tmp_path), "False", "cpu"]


def test_workers_stay_between_calls(graders, score):
    pool = graders("hostile_graders:count_calls", workers=1)
    assert [score(pool, ["a"]).values.item() for _ in range(3)] == [1.0, 2.0, 3.0]


def test_a_worker_that_died_idle_is_replaced_without_blame(graders, score):
    pool = graders("hostile_graders:text_length", workers=1)
    score(pool, ["a"])
    os.killpg(pool._processes[0]._popen.pid, signal.SIGKILL)
    pool._processes[0]._popen.wait(10)
    scores = score(pool, ["ab"])
    assert scores.values.tolist() == [[2.0]]
    assert counted(scores) == {}


def test_workers_outlive_a_sigterm_to_all(graders, score):
    pool = graders("hostile_graders:count_calls", workers=1)
    score(pool, ["a"])
    os.killpg(pool._processes[0]._popen.pid, signal.SIGTERM)
    assert score(pool, ["a"]).values.item() == 2.0


def test_nothing_to_score(graders, score):
    assert score(graders("hostile_graders:text_length", "length"), [], columns={"solution": []}).values.shape == (0, 2)


def test_workers_that_cannot_start_end_the_run(score, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fleeting_rewards.py").write_text(
        "def f(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    rewards = make_rewards(RewardsConfig(reward_funcs=("fleeting_rewards:f",)), CodeRewardsConfig())
    (tmp_path / "fleeting_rewards.py").write_text("raise SystemExit('gone')\n")
    with Graders(rewards, 1, 1.0, 512) as pool, pytest.raises(RunFailure, match="3 in a row did not start"):
        score(pool, ["a"])


def test_errors_are_told_once(graders, score, caplog):
    pool = graders("hostile_graders:text_length")
    score(pool, ["a", "raise"])
    score(pool, ["a", "raise"])
    assert [record.getMessage() for record in caplog.records] == [
        "reward text_length raised KeyError: 'no such thing'; it counts as none (told once)"
    ]


def test_children_of_a_killed_worker_die_with_it(graders, score, tmp_path):
    pids = tmp_path / "pids"
    scores = score(graders("hostile_graders:text_length", workers=1, timeout=2.0), [f"child {pids}"])
    assert counted(scores) == {"rewards/text_length/timeouts": 1}
    assert [gone(pid) for pid in read_pids(pids)] == [True, True]


def test_close_ends_all(graders, score, tmp_path):
    pool = graders("hostile_graders:text_length", workers=3)
    score(pool, ["a"])
    pids = [process._popen.pid for process in pool._processes]
    pool.close()
    assert [gone(pid) for pid in pids] == [True] * 3
    pool.close()


@pytest.mark.parametrize("text", ["child FILE", "hang without threads"])
def test_workers_end_when_the_parent_is_killed(text, tmp_path):
    pids, workers = tmp_path / "pids", tmp_path / "workers"
    script = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from r1jax.config.rewards import CodeRewardsConfig, RewardsConfig
from r1jax.rewards import process
from r1jax.rewards.grading import Graders
from r1jax.rewards.registry import make_rewards
rewards = make_rewards(RewardsConfig(reward_funcs=("hostile_graders:text_length",)), CodeRewardsConfig())
with Graders(rewards, 2, 300.0, 512) as pool:
    open({str(workers)!r}, "w").write(" ".join(str(process._popen.pid) for process in pool._processes))
    pool.score(prompts=["p"], completions=[{text.replace("FILE", str(pids))!r}], completion_ids=[[1]], prefills=[""],
               group_ids=[0], columns={{}}, trainer_state={{}})
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        known = read_pids(workers)
        if "FILE" in text:
            known += read_pids(pids)
        else:
            time.sleep(1.5)  # the workers are up and one of them computes
        assert parent.poll() is None
    finally:
        parent.kill()
        parent.wait()
    assert [gone(pid) for pid in known] == [True] * len(known)
