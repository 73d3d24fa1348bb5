import sys

import pytest

from r1jax.config.errors import UserError
from r1jax.rewards.user_functions import user_reward


def test_a_users_function_knows_its_name_and_columns():
    reward = user_reward("hostile_graders:few_parameters")
    assert (reward.name, reward.columns, reward.users, reward.pooled) == (
        "few_parameters",
        ("difficulty",),
        True,
        False,
    )
    assert user_reward("hostile_graders:sees_everything").columns == ("extra",)
    assert user_reward("hostile_graders:slowly").columns == ()


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("no_such_module:f", "run where the module is found (No module named 'no_such_module')"),
        ("hostile_graders.sub:f", "run where the module is found (No module named 'hostile_graders.sub';"),
        ("hostile_graders:f", "it has no such function (module 'hostile_graders' has no attribute 'f')"),
        ("broken_rewards:f", "its import raised ZeroDivisionError: division by zero"),
        ("unfinished_rewards:f", "its import raised SyntaxError:"),
        ("hostile_graders:not_a_function", "that is a int"),
    ],
)
def test_what_cannot_be_had_is_refused(path, line, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "unfinished_rewards.py").write_text("def f(\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        user_reward(path)
    assert str(caught.value).startswith("reward_funcs: need module:function")
    assert f"got '{path}'; {line}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "broken_rewards" not in sys.modules
