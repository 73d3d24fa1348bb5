"""Golden values of open-r1's accuracy_reward, run with its pinned math-verify 0.5.2 and latex2sympy2_extended 1.0.6."""

import pytest

from r1jax.rewards.accuracy import accuracy_reward, answer_accuracy_reward

GOLDEN = [
    (r"\boxed{\frac{63}{400}}", r"\frac{63}{400}", 1.0),
    (r"\boxed{\frac{63}{400}}", "63/400", 1.0),
    (r"\boxed{3}", "6", 0.0),
    (r"\boxed{6}", "6", 1.0),
    ("6", "6", 0.0),
    ("$6$", "6", 0.0),
    (r"\(6\)", "6", 0.0),
    ("The answer is 6", "6", 0.0),
    ("The answer is $6$", "6", 1.0),
    ("final answer is $6$. I hope it is correct.", "6", 1.0),
    (r"<think>\boxed{5}</think><answer>\boxed{6}</answer>", "6", 1.0),
    (r"<think>\boxed{6}</think><answer>\boxed{5}</answer>", "6", 0.0),
    (r"\boxed{6} or \boxed{7}", "6", 0.0),
    (r"\boxed{6} or \boxed{7}", "7", 0.0),
    (r"\boxed{0.5}", r"$\frac12$", 1.0),
    (r"\boxed{50\%}", "$0.5$", 1.0),
    (r"\boxed{1,2}", "$(1,2)$", 1.0),
    (r"\boxed{\{1,2\}}", r"$\{2,1\}$", 1.0),
    (r"\boxed{x=3}", "$3$", 1.0),
    (r"\boxed{3\text{ cm}}", "$3$", 1.0),
    (r"\boxed{90^\circ}", "$90$", 1.0),
    (r"\boxed{\$5}", "$5$", 1.0),
    (r"\boxed{1000}", "1,000", 1.0),
    (r"\boxed{1{,}000}", "1000", 1.0),
    (r"\boxed{10^{3}}", "1000", 1.0),
    (r"\boxed{\sqrt{4}}", "2", 1.0),
    (r"\boxed{(-\infty,2]}", r"$x \le 2$", 1.0),
    (r"\boxed{3.14}", r"$\pi$", 0.0),
    (r"\boxed{12:30}", "$12:30$", 1.0),
    (r"\boxed{A}", r"\boxed{A}", 1.0),
    (r"\boxed{A}", r"$\text{A}$", 1.0),
    (r"\boxed{A}", "A", None),
    ("forty two", "forty two", None),
    ("", "6", 0.0),
    (r"\boxed{}", "6", 0.0),
    (r"\boxed{\frac63}", "2", 0.0),
    (r"\boxed{\frac{1}{2}", r"$\frac{1}{2}$", 0.0),
]

# Where math-verify 0.9.0 parts from 0.5.2 (there: 0.0): letters' case, and a percentage beside its number.
NEWER = [
    (r"\boxed{a}", r"\boxed{A}", 1.0),
    (r"\boxed{\text{Yes}}", r"$\text{yes}$", 1.0),
    (r"\boxed{10\%}", "10", 1.0),
]


@pytest.mark.parametrize(("text", "solution", "reward"), GOLDEN + NEWER)
def test_accuracy_is_open_r1s(said, text, solution, reward):
    assert accuracy_reward(said(text), solution=[solution], prompts=["p"]) == [reward]


def test_accuracy_of_several(said):
    texts, solutions, rewards = zip(*GOLDEN, strict=True)
    assert accuracy_reward(said(*texts), solution=list(solutions)) == list(rewards)


@pytest.mark.parametrize(("text", "solution", "reward"), GOLDEN)
def test_answer_accuracy_agrees_where_accuracy_knows(said, text, solution, reward):
    got = answer_accuracy_reward(said(text), solution=[solution])
    assert got == [{"A": 1.0, "forty two": 0.0}[solution] if reward is None else reward]


@pytest.mark.parametrize(
    ("text", "solution", "reward"),
    [
        # solutions that accuracy cannot read, or reads as another number
        (r"\boxed{B}", "A", 0.0),
        (r"\boxed{\text{(A)}}", "A", 1.0),
        (r"\boxed{2:3}", "2:3", 1.0),
        (r"\boxed{2}", "2:3", 0.0),
        (r"\boxed{1000}", "10^{3}", 1.0),
        (r"\boxed{10}", "10^{3}", 0.0),
        (r"\boxed{x^2+1}", "x^2+1", 1.0),
        (r"\boxed{(1,2)}", "(1,2)", 1.0),
        (r"\boxed{\text{forty two}}", "forty two", 1.0),
        (r"\boxed{\text{Evelyn}}", "Evelyn", 1.0),
        (r"\boxed{\text{Evelyn}}", "Alice", 0.0),
        (r"\boxed{6}", "The answer is 6.", 1.0),
        (r"\boxed{6}", "6.", 1.0),
        (r"\boxed{1.5}", r"1 \frac12", 1.0),
        (r"\boxed{6}", "", None),
        # the place of the answer
        ("<think>\nx\n</think>\n<answer>\n6\n</answer>", "6", 1.0),
        ("<think>\nx\n</think>\n<answer>\n6\n</answer>", "7", 0.0),
        ("<think>\nx\n</think>\n<answer>\nA\n</answer>", "A", 1.0),
        ("<think>\nx\n</think>\n<answer>\nWe have 6 or 7\n</answer>", "6", 0.0),
        ("<think>\nx\n</think>\n<answer>\n\n</answer>", "6", 0.0),
        ("<think>\nx\n</think>\n<answer>\n$x=6$\n</answer>", "6", 1.0),
        ("<think>\nx\n</think>\n<answer>\nIt is \\boxed{6}, surely.\n</answer>", "6", 1.0),
        ("<think>\nx\n</think>\n<answer>\n5\n</answer>\n<answer>\n6\n</answer>", "6", 1.0),
        ("<think>\n\\boxed{6}\n</think>\n<answer>\nno idea\n</answer>", "6", 0.0),
        ("<think>\n\\boxed{6}\n</think>\nno idea", "6", 0.0),
        ("<think>\nx\n</think>\nThe answer is $6$", "6", 1.0),
        ("<think>\nx\n</think>\n6", "6", 0.0),
        ("<think>\n\\boxed{6}", "6", 0.0),
    ],
)
def test_answer_accuracy(said, text, solution, reward):
    assert answer_accuracy_reward(said(text), solution=[solution]) == [reward]


def test_answer_accuracy_sees_what_the_template_opened(said):
    unclosed = said(r"\boxed{6}")
    assert answer_accuracy_reward(unclosed, solution=["6"], prefills=["<think>\n"]) == [0.0]
    assert answer_accuracy_reward(unclosed, solution=["6"], prefills=[""]) == [1.0]
    closed = said("x\n</think>\n\\boxed{6}")
    assert answer_accuracy_reward(closed, solution=["6"], prefills=["<think>\n"]) == [1.0]
