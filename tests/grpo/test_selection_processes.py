"""Two processes with four devices each select as one with eight: which prompts are asked, and which groups are kept."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.grpo.world import metrics, recipe
from tests.processes import scored, succeed

pytestmark = pytest.mark.integration

PROCESSES = (1, 2)


@pytest.fixture(scope="module")
def folders(world: Path) -> dict[int, Path]:
    """The output_dirs by the number of processes; five generations of four prompts, most of which teach nothing."""
    for processes in PROCESSES:
        config = recipe(
            world, f"selected-{processes}", adam_epsilon=1e-6, log_completions=True, max_steps=5,
            reward_funcs=["tiny_rewards:mostly_dead", "tiny_rewards:noted"], reward_weights=[1.0, 0.0],
            dynamic_sampling=True, prompt_curriculum="pass_rate", curriculum_pass_value=0.8,
        )  # fmt: skip
        (world / f"selected-scored-{processes}").mkdir()
        succeed(processes, 8 // processes, config, SCORED_IN=str(world / f"selected-scored-{processes}"))
    return {processes: world / f"selected-{processes}" for processes in PROCESSES}


def test_the_same_groups_are_trained_on(folders: dict[int, Path]) -> None:
    names = sorted(path.name for path in (folders[1] / "completions").iterdir())
    assert len(names) == 5
    for name in names:
        one, two = (pq.read_table(folders[number] / "completions" / name).to_pydict() for number in PROCESSES)
        assert one == two and any(one["advantage"])


def test_the_same_is_counted(folders: dict[int, Path]) -> None:
    """And every update has full signal in both."""
    for one, two in zip(*(metrics(folders[number], timed=False) for number in PROCESSES), strict=True):
        assert one["selection/dead_groups"] == 0 < one["dynamic_sampling/sampled_groups"]
        names = [name for name in one if name.startswith(("dynamic_sampling/", "selection/", "curriculum/", "reward"))]
        assert len(names) > 10 and one.keys() == two.keys()
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-6)


def test_each_scores_its_share_of_every_round(folders: dict[int, Path]) -> None:
    """Prompts are asked once a generation, by one process; a round of one prompt leaves the other nothing to do."""
    rounds = [row["dynamic_sampling/rounds"] for row in metrics(folders[2])]
    one, two = (scored(folders[number].parent / f"selected-scored-{number}") for number in PROCESSES)
    shares = 0
    for step, rounds_then in enumerate(rounds):
        whole = [sorted(set(part)) for part in one[step]]
        assert len(whole) == rounds_then
        asked = [prompt for part in whole for prompt in part]
        assert len(set(asked)) == len(asked)
        assert sorted(prompt for part in two[step] for prompt in set(part)) == sorted(asked)
        shares += len(two[step])
    assert sum(rounds) < shares <= 2 * sum(rounds)
