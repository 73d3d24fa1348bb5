"""What generations are trained on where most groups teach nothing, from real rollouts of a tiny model on one device.

Of 26 prompts 16 are dead under `mostly_dead`: those whose number is 0, 1 or 2 modulo 5.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r1jax import grpo
from r1jax.checkpoints.orbax import Checkpoints
from r1jax.config.errors import ResumableFailure
from r1jax.config.selection import SelectionConfig
from r1jax.experience import carried_storage, storage
from r1jax.experience.collect import Experience
from r1jax.experience.generations import Generations, Ready
from r1jax.experience.selection import Carried
from r1jax.rollout.vllm_client import ServersLost
from tests.experience.losing import Losing
from tests.grpo.world import NUM_PROMPTS, Pieces, assembled, draw, keys

# Two steps on each of three generations of four prompts.
PLAN: dict[str, Any] = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_steps": 6}
DYNAMIC = SelectionConfig(dynamic_sampling=True)
ALL = SelectionConfig(
    dynamic_sampling=True, dynamic_sampling_max_rounds=2, replay_buffer_size=5, prompt_curriculum="pass_rate",
    curriculum_pass_value=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def pieces(world: Path) -> Iterator[Pieces]:
    with assembled(keys(world, reward_funcs=["tiny_rewards:mostly_dead"], **PLAN)) as found:
        yield found


@pytest.fixture(scope="module")
def hopeless(world: Path) -> Iterator[Pieces]:
    with assembled(keys(world, reward_funcs=["tiny_rewards:dead"], **PLAN)) as found:
        yield found


@dataclasses.dataclass
class Run:
    """Generations, and what was seen of them."""

    generations: Generations
    engine: Losing
    seen: list[Experience]
    metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
    ready: list[Ready] = dataclasses.field(default_factory=list)

    def goes(self, pieces: Pieces, steps: range) -> "Run":
        """Each step by weights of its own, as if it had been trained."""
        for step in steps:
            params = jax.tree.map(lambda leaf, factor=1 + 0.1 * step: leaf * factor, pieces.params)
            ready, metrics = self.generations.ready(step, params)
            self.generations.settle()
            self.ready.append(ready)
            if metrics:
                self.metrics.append(metrics)
        return self


def made(pieces: Pieces, config: SelectionConfig, *, depth: int = 0, masks: bool = False, failures: Any = ()) -> Run:
    engine, seen = Losing(pieces.collector.engine, *failures), []
    collector = dataclasses.replace(pieces.collector, engine=engine)
    generations = grpo.make_generations(
        pieces.config, pieces.layout, pieces.task, collector, pieces.scorers, None,
        lambda done, experience, metrics: seen.append(experience), {},
    )  # fmt: skip
    generations.depth = depth
    generations.selection = dataclasses.replace(generations.selection, config=config, masks_truncated=masks)
    if config.prompt_curriculum != "none":
        generations.carried = Carried(rates=np.full(NUM_PROMPTS, 0.5))
    return Run(generations, engine, seen)


def prompts_of(experience: Experience) -> list[int]:
    return experience.prompts[:: experience.group_size]


def spread(experience: Experience) -> list[bool]:
    """Whether each group has an advantage."""
    return (np.abs(experience.advantages.reshape(-1, experience.group_size)).max(axis=1) > 0.1).tolist()


def assert_same(one: Ready, other: Ready) -> None:
    assert one.lengths == other.lengths
    for a, b in zip(jax.tree.leaves(one.batch), jax.tree.leaves(other.batch), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def dynamic(pieces: Pieces) -> Run:
    return made(pieces, DYNAMIC).goes(pieces, range(6))


def test_every_update_has_full_signal_where_three_prompts_in_five_are_dead(dynamic: Run, pieces: Pieces) -> None:
    for generation, experience in enumerate(dynamic.seen):
        metrics = dynamic.metrics[generation]
        prompts, first = prompts_of(experience), pieces.task.plan.prompts(generation).tolist()
        assert all(spread(experience)) and all(number % 5 >= 3 for number in prompts) and len(set(prompts)) == 4
        # Those of the first prompts that teach stay where they were.
        dead = [number % 5 < 3 for number in first]
        assert [a == b for a, b in zip(prompts, first, strict=True)] == [not each for each in dead]
        assert metrics["selection/dead_groups"] == 0
        assert metrics["dynamic_sampling/replaced_groups"] == sum(dead)
        assert metrics["frac_reward_zero_std"] == np.mean(dead)  # of what was sampled first
        taught = metrics["dynamic_sampling/unused_groups"] + 4
        assert taught <= metrics["dynamic_sampling/sampled_groups"] <= 26
        assert (metrics["dynamic_sampling/rounds"] > 1) == any(dead)
        assert metrics["reward"] < metrics["selection/trained_reward"] or not any(dead)
        assert metrics["time/selection"] >= 0
    assert sum(metrics["dynamic_sampling/replaced_groups"] for metrics in dynamic.metrics) >= 4


def test_the_batch_is_as_large_as_ever(dynamic: Run, pieces: Pieces) -> None:
    plain = made(pieces, SelectionConfig()).goes(pieces, range(1))
    assert plain.ready[0].batch.tokens.shape == dynamic.ready[0].batch.tokens.shape
    assert [len(ready.lengths) for ready in dynamic.ready] == [8] * 6
    assert not any(name.startswith(("dynamic", "selection", "time/selection")) for name in plain.metrics[0])
    # Advantages over the groups that are trained on, as if they had been drawn at once.
    found = dynamic.seen[0]
    np.testing.assert_array_equal(
        found.advantages, pieces.collector.comparison.advantages(found.values, found.group_size)
    )


def test_each_round_asks_new_prompts_by_the_numbers_of_the_generation(dynamic: Run) -> None:
    calls = [event for event in dynamic.engine.events if event[0] == "generate"]
    assert len(calls) == sum(metrics["dynamic_sampling/rounds"] for metrics in dynamic.metrics)
    assert {event[1:] for event in calls} == {(0, 0), (1, 2), (2, 4)}
    for experience in dynamic.seen:
        assert [one.sample for one in experience.rollouts] == [0, 1, 2, 3] * 4


def test_rounds_compile_for_few_numbers_of_prompts(pieces: Pieces) -> None:
    """Once 1, 2 and 4 have been asked, generations of four prompts need no other program."""
    for number in (1, 2, 4):
        draw(pieces, range(number), 4)
    programs: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run = made(pieces, DYNAMIC).goes(pieces, range(6))
        assert max(metrics["dynamic_sampling/rounds"] for metrics in run.metrics) > 1
        assert not {"jit(start_slots)", "jit(finish_slots)"} & set(programs)
        draw(pieces, range(7), 4)
        assert {"jit(start_slots)", "jit(finish_slots)"} <= set(programs)  # as another number would
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("most", "rounds", "sampled"), [(3, 3, 12), (10, 7, 26)])
def test_where_all_are_dead_rounds_end_and_the_run_goes_on(
    hopeless: Pieces, most: int, rounds: int, sampled: int
) -> None:
    """By the bound, or because all prompts were asked: four at a time, and two."""
    config = dataclasses.replace(DYNAMIC, dynamic_sampling_max_rounds=most)
    run = made(hopeless, config).goes(hopeless, range(3))
    for metrics, experience in zip(run.metrics, run.seen, strict=True):
        assert metrics["dynamic_sampling/rounds"] == rounds
        assert metrics["dynamic_sampling/sampled_groups"] == sampled
        assert metrics["selection/dead_groups"] == 4 and metrics["dynamic_sampling/replaced_groups"] == 0
        assert not experience.advantages.any()
    assert [prompts_of(each) for each in run.seen] == [hopeless.task.plan.prompts(number).tolist() for number in (0, 1)]


def test_a_signal_in_masked_completions_alone_is_none(pieces: Pieces, dynamic: Run) -> None:
    """In every group that is trained on, a completion that is not cut off has an advantage; else not in all."""

    def trained(run: Run) -> np.ndarray:
        whole = [[not one.truncated for one in experience.rollouts] for experience in run.seen]
        differs = [np.abs(experience.advantages) > 1e-3 for experience in run.seen]
        return np.asarray((np.asarray(whole) & np.asarray(differs)).reshape(-1, 4).any(axis=1))

    assert trained(made(pieces, DYNAMIC, masks=True).goes(pieces, range(6))).all()
    assert not trained(dynamic).all()


def test_rounds_behind_a_generation_drawn_ahead_are_by_the_present_weights(pieces: Pieces) -> None:
    run = made(pieces, DYNAMIC, depth=1).goes(pieces, range(6))
    assert all(all(spread(experience)) for experience in run.seen)
    for generation, (experience, metrics) in enumerate(zip(run.seen, run.metrics, strict=True)):
        first = pieces.task.plan.prompts(generation).tolist()
        versions = {one.prompt_id: one.versions[0].version for one in experience.rollouts}
        now, ahead = 2 * generation, max(0, 2 * generation - 2)
        assert versions == {prompt: ahead if prompt in first else now for prompt in versions}
        assert metrics["sampling/staleness/max"] == (2 if generation and set(first) & versions.keys() else 0)


def test_servers_that_are_lost_in_a_round_change_nothing(pieces: Pieces, dynamic: Run) -> None:
    lost = ServersLost("vllm: is down")
    run = made(pieces, DYNAMIC, failures=[None, lost, None, lost]).goes(pieces, range(6))
    assert ("lost", 0) in run.engine.events
    for one, other in zip(run.ready, dynamic.ready, strict=True):
        assert_same(one, other)


def test_a_failure_leaves_what_was_handed_on_as_it_was(pieces: Pieces) -> None:
    """The loop saves it then, and the run that goes on makes the same generation again."""
    lost = ServersLost("vllm: is down")
    run = made(pieces, ALL, failures=[None, None, None, *[lost] * 9]).goes(pieces, range(2))
    before = run.generations.carried
    assert before.buffer and before.rates is not None
    with pytest.raises(ResumableFailure):
        run.goes(pieces, range(2, 6))
    assert run.generations.carried is before and ("generate", 1, 2) in run.engine.events


class Deaf(Losing):
    """Takes no weights of the third update."""

    def sync(self, params: Any, version: int, *, lost: bool = False) -> None:
        if version == 2:
            raise ResumableFailure("vllm: no server took the weights")
        super().sync(params, version, lost=lost)


def test_so_does_one_behind_the_choice(pieces: Pieces) -> None:
    """While the next generation is begun: this one has not been trained on yet."""
    run = made(pieces, SelectionConfig(prompt_curriculum="pass_rate"), depth=1)
    engine = Deaf(pieces.collector.engine)
    run.generations.collector = dataclasses.replace(run.generations.collector, engine=engine)
    run.goes(pieces, range(2))
    before = run.generations.carried
    with pytest.raises(ResumableFailure):
        run.goes(pieces, range(2, 3))
    assert run.generations.carried is before and len(run.metrics) == 1


def test_stored_groups_stand_in_for_dead_ones(pieces: Pieces) -> None:
    """As they were sampled, whatever their age; none twice in a batch."""
    run = made(pieces, SelectionConfig(replay_buffer_size=6)).goes(pieces, range(6))
    known: dict[tuple[int, int], Any] = {}
    replayed, sizes = 0, []
    for generation, (experience, metrics) in enumerate(zip(run.seen, run.metrics, strict=True)):
        first = pieces.task.plan.prompts(generation).tolist()
        strange = [at for at, prompt in enumerate(prompts_of(experience)) if prompt != first[at]]
        assert metrics["replay_buffer/replayed_groups"] == len(strange)
        replayed += len(strange)
        for place in range(4):
            span = slice(4 * place, 4 * place + 4)
            one = experience.rollouts[span][0]
            key = (one.prompt_id, one.versions[0].version)
            if place in strange:
                rollouts, advantages = known[key]
                assert rollouts == experience.rollouts[span]
                np.testing.assert_array_equal(advantages, experience.advantages[span])
            elif spread(experience)[place]:
                known[key] = (experience.rollouts[span], experience.advantages[span])
        sizes.append(min(6, len(known)))
        dead = sum(not each for each in spread(experience))
        assert metrics["selection/dead_groups"] == dead
        assert metrics["sampling/staleness/max"] == 2 * generation - min(
            one.versions[0].version for one in experience.rollouts
        )
    assert [metrics["replay_buffer/size"] for metrics in run.metrics] == sizes
    assert replayed >= 2 and run.metrics[-1]["sampling/staleness/max"] > 0


def test_the_curriculum_asks_what_its_rates_say(pieces: Pieces) -> None:
    """Prompts known to fail are asked where nothing else is left; rates follow what is sampled."""
    config = SelectionConfig(prompt_curriculum="pass_rate", curriculum_pass_value=1.0)
    run = made(pieces, config)
    rates = np.where(np.arange(NUM_PROMPTS) % 5 >= 3, 0.5, 0.0)
    run.generations.carried = Carried(rates=rates)
    run.goes(pieces, range(6))
    alive = [number % 5 >= 3 for experience in run.seen for number in prompts_of(experience)]
    assert np.mean(alive) > 0.7  # 10 of 26 prompts
    later = run.generations.carried.rates
    assert later is not None
    asked = {number for experience in run.seen for number in prompts_of(experience)}
    assert {number for number in range(NUM_PROMPTS) if later[number] != rates[number]} <= asked
    assert run.metrics[-1]["curriculum/mean_pass_rate"] == pytest.approx(later.mean())


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_that_goes_on_trains_on_the_same(pieces: Pieces, tmp_path: Path, depth: int, stop: int) -> None:
    """Between generations (2, 4) and inside them (1, 3), with everything on; the checkpoint is all that is left.

    Where a generation was being drawn ahead the samples themselves come from a server's journal; here they are drawn
    by the weights that a run without interruption had for it.
    """
    whole = made(pieces, ALL, depth=depth).goes(pieces, range(6))
    assert sum(metrics["replay_buffer/replayed_groups"] for metrics in whole.metrics) > 0
    assert sum(metrics["dynamic_sampling/replaced_groups"] for metrics in whole.metrics) > 0
    before = made(pieces, ALL, depth=depth).goes(pieces, range(stop))
    again = made(pieces, ALL, depth=depth)
    with checkpoints(tmp_path) as kept:
        save(kept, stop, before.generations, pieces)
    with checkpoints(tmp_path) as kept:
        take(kept, stop, again.generations, pieces)
    if depth and stop < 5:
        ahead = 2 * (stop // 2 + stop % 2)
        drawn_by = jax.tree.map(lambda leaf, factor=1 + 0.1 * (ahead - 2): leaf * factor, pieces.params)
        again.generations.collector.sync(drawn_by, ahead - 2)
        generation = ahead // 2
        indices = again.generations.selection.prompts(generation, again.generations.carried)
        again.generations.drawing = again.generations.collector.begin(again.generations._request(generation, indices))
    again.goes(pieces, range(stop, 6))
    for one, other in zip(again.ready, whole.ready[stop:], strict=True):
        assert_same(one, other)
    rates = again.generations.carried.rates, whole.generations.carried.rates
    np.testing.assert_array_equal(*rates)


@contextlib.contextmanager
def checkpoints(folder: Path) -> Iterator[Checkpoints]:
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as found:
        yield found


def save(kept: Checkpoints, step: int, generations: Generations, pieces: Pieces) -> None:
    """As `grpo.run` does it, beside a state of one number."""
    trees, about = storage.stored(generations.kept)
    more, told = carried_storage.stored(generations.carried, pieces.task.reward_names, pieces.layout.batch)
    state = {"params": {"x": jax.device_put(np.float32(step))}}
    assert kept.save(step, {**state, **trees, **more}, {**about, **told})


def take(kept: Checkpoints, step: int, generations: Generations, pieces: Pieces) -> None:
    about, sharding = kept.metadata(step), pieces.layout.batch
    abstract = {
        "params": {"x": jax.ShapeDtypeStruct((), np.float32)},
        **storage.abstract(about, sharding),
        **carried_storage.abstract(about, sharding),
    }
    trees, _ = kept.restore(step, abstract)
    generations.kept = storage.restored(trees, about, pieces.task.geometry, sharding)
    config, start = generations.selection.config, generations.carried
    names = pieces.task.reward_names
    generations.carried = carried_storage.restored(trees, about, start, names, config.replay_buffer_size)
