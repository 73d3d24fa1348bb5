from collections.abc import Sequence

import numpy as np
import pytest

from r1jax.experience.collect import Experience
from r1jax.experience.groups import Group, has_signal
from r1jax.experience.rounds import filled, round_size, unfilled
from r1jax.objectives.advantages import Comparison
from tests.experience.conftest import make_experience


def teaches(group: Group) -> bool:
    return has_signal(group, Comparison(), masks_truncated=False)


class Asked:
    """Answers with groups that teach where the prompt's number is even."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def __call__(self, prompts: Sequence[int]) -> Experience:
        self.prompts.append(list(prompts))
        return answers(*prompts)


def answers(*prompts: int) -> Experience:
    return make_experience({prompt: [1.0, 1.0 if prompt % 2 else 0.0] for prompt in prompts})


@pytest.mark.parametrize(
    ("missing", "taught", "sampled", "wanted"),
    [
        (1, 7, 8, 1), (2, 6, 8, 2), (3, 5, 8, 4), (3, 4, 8, 8), (5, 3, 8, 8), (8, 0, 8, 8), (1, 7, 16, 2), (1, 0, 8, 8),
    ],
)  # fmt: skip
def test_a_round_is_about_what_it_takes(missing: int, taught: int, sampled: int, wanted: int) -> None:
    """Missing x sampled / taught, as a power of two; never more than a generation batch has."""
    assert round_size(missing, taught, sampled, 8) == wanted


def test_sizes_of_rounds_are_few() -> None:
    """Each costs the embedded engine a program."""
    sizes = {round_size(missing, taught, 96, 96) for missing in range(1, 97) for taught in range(97)}
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 96}


def test_dead_places_take_the_groups_that_teach_in_their_order() -> None:
    """Of prompts 0, 1, 3, 5 one teaches: a round of four has 7 and 9 without signal, 8 and 10 with; so the next has."""
    ask, start = Asked(), unfilled(answers(0, 1, 3, 5), teaches)
    assert start.dead == (1, 2, 3)
    found = filled(start, [7, 8, 9, 10, 11, 12, 14, 16, 18], ask, teaches, 10)
    assert ask.prompts == [[7, 8, 9, 10], [11, 12]]
    assert [group.prompt for group in found.groups] == [0, 8, 10, 12]
    assert (found.dead, found.sampled, found.taught, found.unused, len(found.rounds)) == ((), 10, 4, 0, 3)


def test_what_no_place_is_left_for_is_counted() -> None:
    found = filled(unfilled(answers(0, 1, 3, 5), teaches), [2, 4, 6, 8], Asked(), teaches, 10)
    assert [group.prompt for group in found.groups] == [0, 2, 4, 6] and found.unused == 1


def test_rounds_end_at_their_bound_and_with_the_prompts() -> None:
    start = unfilled(answers(1, 3), teaches)
    for most, fresh, rounds in ((4, range(5, 99, 2), 4), (9, range(5, 15, 2), 4), (9, [], 1)):
        ask = Asked()
        found = filled(start, list(fresh), ask, teaches, most)
        assert len(found.rounds) == rounds == len(ask.prompts) + 1 and found.dead == (0, 1)
        assert [group.prompt for group in found.groups] == [1, 3]


def test_a_whole_batch_asks_nothing() -> None:
    ask = Asked()
    assert not filled(unfilled(answers(0, 2), teaches), [4], ask, teaches, 10).dead and ask.prompts == []


@pytest.mark.parametrize("seed", range(5))
def test_a_large_batch_of_mostly_dead_groups_is_filled_in_a_few_rounds(seed: int) -> None:
    """128 places, three groups in five dead: rounds of as many as are missing would need more than ten half of the
    time."""
    alive = np.random.default_rng(seed).random(2000) < 0.4
    sizes: list[int] = []

    def ask(prompts: Sequence[int]) -> Experience:
        sizes.append(len(prompts))
        return make_experience({prompt: [1.0, 0.0 if alive[prompt] else 1.0] for prompt in prompts})

    found = filled(unfilled(ask(range(128)), teaches), range(128, 2000), ask, teaches, 10)
    assert not found.dead and len(found.rounds) <= 4 and sum(sizes) == found.sampled
    assert set(sizes) <= {1, 2, 4, 8, 16, 32, 64, 128}
