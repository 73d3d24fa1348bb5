"""States that the real engine trained, as what is written from and as what must come back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from r1jax.deepspeed.saved import Scheduler
from r1jax.deepspeed.training_state import ParamGroup, TrainingState
from r1jax.deepspeed.zero_layout import KINDS
from tests.real_deepspeed.launch import Results, run_cases


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run of three steps, its checkpoint, and the losses of its next three."""

    folder: Path
    results: Results
    tied: bool

    @property
    def source(self) -> TrainingState:
        arrays, facts = self.results
        names = [name for group in facts["names"] for name in group]
        return TrainingState(
            shapes={name: arrays[f"fp32/{name}"].shape for name in names},
            tied={"lm_head.weight": "model.embed_tokens.weight"} if self.tied else {},
            groups=tuple(
                ParamGroup(
                    names=tuple(names),
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    betas=tuple(group["betas"]),
                    eps=group["eps"],
                )
                for names, group in zip(facts["names"], facts["groups"], strict=True)
            ),
            tensors=lambda: ((name, kind, arrays[f"{kind}/{name}"]) for name in names for kind in KINDS),
            adam_step=facts["global_steps"],
            global_step=facts["global_steps"],
            global_samples=facts["global_samples"],
            scheduler=Scheduler("model_states", facts["scheduler"]),
        )


@pytest.fixture(scope="session")
def float32(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """One process, stage 2, by whether the head is tied."""
    folder = tmp_path_factory.mktemp("float32")
    cases = {
        name: {"command": "train", "tied": name == "tied", "stage": 2, "dtype": "fp32"} for name in ("untied", "tied")
    }
    return _references(folder, cases, run_cases(folder, 1, cases))


@pytest.fixture(scope="session")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Reference]:
    """Two processes, by stage."""
    folder = tmp_path_factory.mktemp("bfloat16")
    cases = {
        f"z{stage}": {"command": "train", "tied": stage == 3, "stage": stage, "dtype": "bf16"} for stage in (1, 2, 3)
    }
    made = _references(folder, cases, run_cases(folder, 2, cases))
    return {stage: made[f"z{stage}"] for stage in (1, 2, 3)}


def _references(folder: Path, cases: dict[str, dict], results: dict[str, Results]) -> dict[str, Reference]:
    return {name: Reference(folder / name / "checkpoint", results[name], case["tied"]) for name, case in cases.items()}


@pytest.fixture
def same_state() -> Callable[[Results, Results], None]:
    """Raises unless every parameter's weights and moments are bit for bit the same."""

    def check(got: Results, wanted: Results) -> None:
        assert got.arrays.keys() == wanted.arrays.keys()
        for name, array in wanted.arrays.items():
            np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)

    return check
