import pytest

from r1jax.rewards.formats import (
    code_format_reward,
    extract_code,
    format_reward,
    get_code_format_reward,
    get_strict_code_format_reward,
    strict_format_reward,
    strict_tag_count_reward,
    tag_count_reward,
    think_format_reward,
)

GOOD = "<think>\nreasons\n</think>\n<answer>\n6\n</answer>"


# Text, open-r1's format, ours.
@pytest.mark.parametrize(
    ("text", "loose", "strict"),
    [
        (GOOD, 1.0, 1.0),
        (GOOD + "\ngarbage", 1.0, 0.0),
        (GOOD + " garbage", 0.0, 0.0),
        (GOOD + "\n", 1.0, 0.0),
        ("\n" + GOOD, 0.0, 0.0),
        ("<think>\na\n</think>\nb\n</think>\n<answer>\n6\n</answer>", 1.0, 0.0),
        ("<think>\n<think>\nb\n</think>\n<answer>\n6\n</answer>", 1.0, 0.0),
        ("<think>\na\n</think>\n\n<answer>\n6\n</answer>", 0.0, 0.0),
        ("<think>\n</think>\n<answer>\n6\n</answer>", 0.0, 0.0),
        ("<think>\n\n</think>\n<answer>\n\n</answer>", 1.0, 1.0),
        ("<think>a</think><answer>6</answer>", 0.0, 0.0),
        (GOOD + "\n" + GOOD, 1.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_format(said, text, loose, strict):
    assert format_reward(said(text), prompts=["p"]) == [loose]
    assert strict_format_reward(said(text), prompts=["p"]) == [strict]


def test_a_prefill_counts_for_our_formats_and_not_for_open_r1s(said):
    rest = said(GOOD.removeprefix("<think>\n"))
    opened = {"prefills": ["<think>\n"]}
    assert (format_reward(rest, **opened), strict_format_reward(rest, **opened)) == ([0.0], [1.0])
    assert (tag_count_reward(rest, **opened), strict_tag_count_reward(rest, **opened)) == ([0.75], [1.0])
    assert (think_format_reward(rest, **opened), think_format_reward(rest)) == ([1.0], [0.0])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>", 1.0),
        ("<think>\na\n</think>\n6", 1.0),
        ("<think></think>", 1.0),
        ("<think>a<think>b</think>", 0.0),
        ("<think>a</think><think>b</think>", 0.0),
        ("<think>a", 0.0),
        ("a<think>b</think>", 0.0),
        ("a</think>", 0.0),
    ],
)
def test_think_format_is_trls(said, text, reward):
    assert think_format_reward(said(text)) == [reward]


@pytest.mark.parametrize(
    ("text", "loose", "strict"),
    [
        (GOOD, 1.0, 1.0),
        ("<think>\n</think>\n<answer>\n</answer>", 1.0, 0.5),
        (GOOD + "\n</answer>", 0.75, 0.75),
        ("<think>\na\n</think>\n", 0.5, 0.5),
        ("<think>\na\n</think>", 0.25, 0.5),
        ("<think>a</think><answer>6</answer>", 0.0, 0.0),
        ("x\n</answer>\n<answer>\ny\n</think>\n<think>\n", 1.0, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_tag_count(said, text, loose, strict):
    assert tag_count_reward(said(text)) == [loose]
    assert strict_tag_count_reward(said(text)) == [strict]


def coded(block: str, after: str = "") -> str:
    return f"<think>\na\n</think>\n<answer>\n{block}\n</answer>{after}"


@pytest.mark.parametrize(
    ("text", "loose", "strict"),
    [
        (coded("```python\nx\n```"), 1.0, 1.0),
        (coded("Here:\n```python\nx\n```\nDone."), 1.0, 1.0),
        (coded("```python3\nx\n```"), 1.0, 0.0),
        (coded("```py\nx\n```"), 0.0, 0.0),
        (coded("```python\nx"), 0.0, 0.0),
        (coded("```cpp\nx\n```"), 0.0, 0.0),
        (coded("```python\nx\n```", "\nmore"), 1.0, 0.0),
        ("```python\nx\n```", 0.0, 0.0),
        ("<think>\n```python\nx\n```\n</think>\n<answer>\nno code\n</answer>", 0.0, 0.0),
    ],
)
def test_code_format(said, text, loose, strict):
    assert get_code_format_reward("python")(said(text)) == [loose]
    assert get_strict_code_format_reward("python")(said(text)) == [strict]


@pytest.mark.parametrize("get", [get_code_format_reward, get_strict_code_format_reward])
def test_a_rows_language_goes_before_the_configured_one(said, get):
    texts = said(coded("```cpp\nx\n```"), coded("```cpp\nx\n```"), coded("```python\nx\n```"))
    assert get("python")(texts, language=["cpp", "python", None]) == [1.0, 0.0, 1.0]
    assert get("cpp")(texts) == [1.0, 1.0, 0.0]


def test_code_format_is_named_as_open_r1_names_it():
    assert get_code_format_reward("python").__name__ == code_format_reward.__name__ == "code_format_reward"


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        ("a\n```python\nx = 1\n```\nb\n```python\nx = 2\n```", "python", "x = 2\n"),
        ("```cpp\nint x;\n```", "cpp", "int x;\n"),
        ("```c++\nint x;\n```", "c++", "int x;\n"),
        ("```python\nx\n```", "cpp", ""),
        ("```python\nx\n```", None, ""),
        ("```python\nx", "python", ""),
        ("```py\nx\n```", "python", ""),
        ("no code", "python", ""),
    ],
)
def test_extract_code(text, language, code):
    assert extract_code(text, language) == code
