import pytest

from r1jax.quickstart.base_model import make_tokenizer, write_base_model
from r1jax.quickstart.measure import MAX_NEW_TOKENS, NUM_SAMPLES, measure, score
from r1jax.quickstart.problems import Problem, held_out_problems, response

PROBLEMS = [Problem((2, 3, 1, 1)), Problem((9, 9, 9, 9))]


def test_accuracy_and_its_error_by_hand():
    right = [response(problem, problem.answer) for problem in PROBLEMS]
    found = score(PROBLEMS, [[right[0], right[0], "", right[1]], [right[1], "", "", ""]])
    # Shares 1/2 and 1/4: mean 3/8, variance 1/32, error sqrt(1/64).
    assert (found.accuracy, found.standard_error) == pytest.approx((3 / 8, 1 / 8))


def test_one_problem_has_a_score():
    assert score(PROBLEMS[:1], [[response(PROBLEMS[0])]]).accuracy == 1


def test_the_longest_answer_fits():
    longest = Problem((9, 9, 9, 9))  # results 18, 27, 36
    assert len(make_tokenizer()(response(longest))["input_ids"]) < MAX_NEW_TOKENS


def test_a_random_model_knows_nothing_and_is_sampled_as_often_as_said(tmp_path):
    write_base_model(tmp_path, seed=0)
    problems = held_out_problems(3)
    found = measure(tmp_path, problems, seed=0)
    assert found.accuracy == 0
    assert [len(samples) for samples in found.texts] == [NUM_SAMPLES] * 3
    assert len({text for samples in found.texts for text in samples}) == NUM_SAMPLES * 3
