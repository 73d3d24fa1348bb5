import numpy as np

from r1jax.rewards.ledger import KILLS_IN_A_ROW, Ledger, Task
from r1jax.rewards.reward import Reward, UserFunction
from r1jax.rewards.worker import Answer, Call

PLAIN = [Reward(name=name, columns=(), function=len) for name in "abc"]
USERS = Reward(name="u", columns=(), function=UserFunction("m:f"))


def call(task: Task) -> Call:
    return Call(functions=task.functions, samples=task.samples, kwargs={})


def counted(ledger: Ledger) -> dict:
    return {name: count for name, count in ledger.counts.items() if count}


def test_a_users_function_comes_first_and_whole():
    ledger = Ledger([PLAIN[0], USERS, PLAIN[1]], 2)
    tasks = [ledger.take() for _ in range(4)]
    assert tasks == [Task((1,), (0, 1)), Task((0, 2), (0,)), Task((0, 2), (1,)), None]
    assert not Ledger([USERS], 0).waiting()


def test_answers_are_entered_where_they_belong():
    ledger = Ledger([PLAIN[0], USERS], 2)
    ledger.enter(call(Task((1,), (0, 1))), 1, Answer([0.5, None]))
    ledger.enter(call(Task((0,), (1,))), 0, Answer([2.0]))
    np.testing.assert_array_equal(ledger.values, [[np.nan, 0.5], [2.0, np.nan]])
    assert counted(ledger) == {"rewards/u/none": 1}


def test_those_behind_the_guilty_are_asked_again():
    ledger = Ledger(PLAIN, 1)
    task = ledger.take()
    assert task is not None
    ledger.lost(call(task), 1, "timeouts")
    assert ledger.take() == Task((2,), (0,))
    assert ledger.take() is None
    assert counted(ledger) == {"rewards/b/timeouts": 1}


def test_a_failed_batch_is_asked_sample_by_sample():
    for failure in (
        lambda led, made: led.lost(made, 0, "crashes"),
        lambda led, made: led.enter(made, 0, Answer([], "E")),
    ):
        ledger = Ledger([USERS], 2)
        task = ledger.take()
        assert task is not None
        failure(ledger, call(task))
        assert [ledger.take() for _ in range(3)] == [Task((0,), (0,)), Task((0,), (1,)), None]
        assert counted(ledger) == {"rewards/u/batch_failures": 1}


def test_a_reward_that_only_gets_killed_is_given_up():
    ledger = Ledger(PLAIN[:2], KILLS_IN_A_ROW + 3)
    for _ in range(KILLS_IN_A_ROW):
        ledger.lost(call(Task((0,), (0,))), 0, "timeouts")
    assert ledger.take() == Task((1,), (0,))
    assert counted(ledger) == {"rewards/a/timeouts": KILLS_IN_A_ROW, "rewards/a/given_up": 1}


def test_an_answer_ends_the_row_of_kills():
    ledger = Ledger(PLAIN[:1], KILLS_IN_A_ROW + 3)
    for _ in range(KILLS_IN_A_ROW):
        ledger.lost(call(Task((0,), (0,))), 0, "timeouts")
    ledger.enter(call(Task((0,), (1,))), 0, Answer([1.0]))
    assert ledger.take() == Task((0,), (0,))
