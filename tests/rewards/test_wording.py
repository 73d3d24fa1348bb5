import pickle

import pytest

from r1jax.rewards.wording import (
    get_repetition_penalty_reward,
    reasoning_steps_by_line_reward,
    reasoning_steps_reward,
)


# Text, matches that open-r1's expression finds, and with MULTILINE.
@pytest.mark.parametrize(
    ("text", "loose", "by_line"),
    [
        ("1. a\n2. b\n3. c", 1, 3),
        ("Step 1: a\nStep 2: b\nStep 3: c", 3, 3),
        ("First, a. Second, b. Next, c. Finally, d.", 4, 4),
        ("a\n- b\n* c", 2, 2),
        ("- b", 0, 0),
        ("a 1. b", 0, 0),
        ("Step 1 a", 0, 0),
        ("", 0, 0),
    ],
)
def test_reasoning_steps(said, text, loose, by_line):
    assert reasoning_steps_reward(said(text), prompts=["p"]) == [pytest.approx(min(1, loose / 3))]
    assert reasoning_steps_by_line_reward(said(text), prompts=["p"]) == [pytest.approx(min(1, by_line / 3))]


@pytest.mark.parametrize(
    ("text", "size", "reward"),
    [
        ("", 2, 0.0),
        ("one", 2, 0.0),
        ("a b c d", 2, 0.0),
        ("a b a b", 2, -1 / 3),  # ab, ba, ab
        ("A b a B", 2, -1 / 3),
        ("a a a a a", 2, -3 / 4),
        ("a a a a a", 3, -2 / 3),
        ("a  b\na\tb", 2, -1 / 3),
        ("a a", 1, -1 / 2),
    ],
)
def test_repetition_penalty(said, text, size, reward):
    assert get_repetition_penalty_reward(size, -1.0)(said(text), prompts=["p"]) == [pytest.approx(reward)]
    assert get_repetition_penalty_reward(size, -0.5)(said(text)) == [pytest.approx(reward / 2)]


def test_repetition_penalty_refuses_what_is_no_penalty():
    with pytest.raises(ValueError, match=r"^max_penalty 1\.5 should not be positive$"):
        get_repetition_penalty_reward(3, 1.5)
    assert get_repetition_penalty_reward(3, 0.0)([[{"content": "a a a a"}]]) == [0.0]


def test_repetition_penalty_refuses_other_languages():
    with pytest.raises(ValueError, match=r"^language: need en or zh, got 'fr'"):
        get_repetition_penalty_reward(3, -1.0, "fr")


def test_repetition_penalty_in_chinese(said):
    # jieba: five times one word is five words; without spaces English sees one
    text = "苹果苹果苹果苹果苹果"
    assert get_repetition_penalty_reward(2, -1.0, "zh")(said(text)) == [pytest.approx(-3 / 4)]
    assert get_repetition_penalty_reward(2, -1.0, "en")(said(text)) == [0.0]
    assert get_repetition_penalty_reward(3, -1.0, "zh")(said("", "苹果")) == [0.0, 0.0]


def test_a_function_with_its_numbers_is_named_and_travels(said):
    function = pickle.loads(pickle.dumps(get_repetition_penalty_reward(2, -1.0)))
    assert function.__name__ == "repetition_penalty_reward"
    assert function(said("a a a")) == [-0.5]
