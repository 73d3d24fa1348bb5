from typing import Any

import pytest

from r1jax.rewards.lengths import (
    get_clamped_cosine_reward,
    get_cosine_scaled_reward,
    get_soft_overlong_punishment,
    group_length_reward,
    len_reward,
)

OPTIONS: dict[str, Any] = dict(
    min_value_wrong=0.0, max_value_wrong=-0.5, min_value_correct=0.5, max_value_correct=1.0, max_len=1000
)
"""open-r1's options for cosine, by their defaults."""


def of_length(answer: str, length: int) -> str:
    text = rf"\boxed{{{answer}}}"
    return text + " " * (length - len(text))


@pytest.mark.parametrize(
    ("length", "correct", "wrong"),
    [(10, 0.999877, -0.000123), (500, 0.75, -0.25), (1000, 0.5, -0.5), (1500, 0.75, -0.25), (2000, 1.0, 0.0)],
)
def test_cosine_is_open_r1s(said, length, correct, wrong):
    texts = said(of_length("6", length), of_length("7", length))
    rewards = get_cosine_scaled_reward(**OPTIONS)(texts, solution=["$6$"] * 2, prompts=["p"] * 2)
    assert rewards == [pytest.approx(correct, abs=1e-6), pytest.approx(wrong, abs=1e-6)]


def test_cosine_has_open_r1s_own_defaults(said):
    rewards = get_cosine_scaled_reward()(said(of_length("7", 500), of_length("7", 1000)), solution=["$6$"] * 2)
    assert rewards == [pytest.approx(-0.75), pytest.approx(-0.5)]


@pytest.mark.parametrize("solution", ["forty two", "1", "6"])
def test_cosine_gives_everybody_one_for_a_solution_that_is_no_latex(said, solution):
    texts = said(of_length("6", 300), "nonsense")
    assert get_cosine_scaled_reward(**OPTIONS)(texts, solution=[solution] * 2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("length", "correct", "wrong"),
    [(10, 0.999877, -0.000123), (500, 0.75, -0.25), (1000, 0.5, -0.5), (1500, 0.5, -0.5), (2000, 0.5, -0.5)],
)
def test_clamped_cosine_ends_at_its_length(said, length, correct, wrong):
    texts = said(of_length("6", length), of_length("7", length))
    rewards = get_clamped_cosine_reward(**OPTIONS)(texts, solution=["6"] * 2, prompts=["p"] * 2)
    assert rewards == [pytest.approx(correct, abs=1e-6), pytest.approx(wrong, abs=1e-6)]


def test_clamped_cosine_reads_answers_as_answer_accuracy_does(said):
    function = get_clamped_cosine_reward(**OPTIONS)
    text = r"\boxed{6}" + " " * 491
    assert function(said(text), solution=["6"], prefills=["<think>\n"]) == [pytest.approx(-0.25)]
    assert function(said(text), solution=[""]) == [None]


def test_length_is_open_r1s(said):
    texts = said(of_length("6", 100), of_length("6", 200), of_length("6", 300))
    assert len_reward(texts, solution=["$6$"] * 3, prompts=["p"] * 3) == [0.5, 0.0, -0.5]
    wrong = said(of_length("7", 100), of_length("7", 200), of_length("7", 300))
    assert len_reward(wrong, solution=["$6$"] * 3) == [0.0, 0.0, -0.5]
    assert len_reward(said(*[of_length("6", 50)] * 2), solution=["$6$", "$7$"]) == [0.0, 0.0]
    # unreadable: taken for right
    assert len_reward(said("a", "abc"), solution=["6", "6"]) == [0.5, -0.5]


def test_length_believes_what_is_known_of_the_answers(said):
    texts = said("a", "ab", "abc")
    assert len_reward(texts, solution=["$6$"] * 3, correct=[False, None, True]) == [0.0, None, -0.5]


def test_group_length_pools_by_prompt(said):
    texts = said(*[of_length("6", length) for length in (10, 20, 1000, 2000)], of_length("7", 1500), "none")
    rewards = group_length_reward(texts, solution=["6"] * 5 + [""], group_ids=[0, 0, 1, 1, 1, 2])
    assert rewards == [0.5, -0.5, 0.5, -0.5, 0.0, None]
    # the same members in another order, the same rewards
    order = [4, 0, 3, 5, 1, 2]
    mixed = group_length_reward(
        [texts[i] for i in order],
        solution=[(["6"] * 5 + [""])[i] for i in order],
        group_ids=[[0, 0, 1, 1, 1, 2][i] for i in order],
    )
    assert mixed == [rewards[i] for i in order]


@pytest.mark.parametrize(
    ("tokens", "reward"),
    [(0, 0.0), (12288, 0.0), (12289, -1 / 4096), (14336, -0.5), (16384, -1.0), (16385, -1.0), (99999, -1.0)],
)
def test_soft_overlong_punishment(tokens, reward):
    function = get_soft_overlong_punishment(16384, 4096)
    assert function(completion_ids=[[1] * tokens], prompts=["p"]) == [reward]


def test_names_are_open_r1s():
    names = [get_cosine_scaled_reward().__name__, get_soft_overlong_punishment(2, 1).__name__, len_reward.__name__]
    assert names == ["cosine_scaled_reward", "soft_overlong_punishment_reward", "len_reward"]
