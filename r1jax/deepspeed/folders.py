"""From the path that a user gives to the files of one DeepSpeed checkpoint."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from r1jax.config.errors import need, shown
from r1jax.deepspeed.names import UNIVERSAL_FOLDER
from r1jax.deepspeed.torch_file import reading

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
TRAINER_STATE = "trainer_state.json"
WHAT = "a folder with a DeepSpeed checkpoint"

_TRAINER_FOLDER = re.compile(r"checkpoint-(\d{1,18})")
_TAG = re.compile(r"(?!\.)[\w.+=@ -]{1,200}")
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d{1,6})_)?mp_rank_(?P<part>\d\d)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?P<bf16>bf16_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<part>\d\d)_optim_states\.pt")
_PARALLEL = re.compile(r"(?:expp_rank_|layer_\d+).*\.pt")

_WHOLE = "copy the whole folder again or name another checkpoint"
_MERGED = "only ZeRO's data parallelism is read: merge it into a plain checkpoint with the tool that made it"


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint."""

    folder: Path
    """The tag's folder, such as global_step300."""
    trainer: Path | None
    """The folder with what Hugging Face's Trainer keeps beside it."""
    model: tuple[Path, ...]
    """By rank; one file for all ranks up to stage 2."""
    optimizer: tuple[Path, ...]
    """By rank; none in a universal checkpoint."""
    bf16: bool
    """Whether the files' names say that the model is in bfloat16."""

    @property
    def universal(self) -> bool:
        return not self.optimizer

    @property
    def model_by_rank(self) -> bool:
        """Whether the model's file names have a rank, as at stage 3."""
        return self.model[0].name.startswith("zero_pp_rank_")


def find_checkpoint(path: Path) -> CheckpointFiles:
    """The files of the checkpoint there; raises `UserError` where there is none or a file of a rank is missing.

    `path` is a tag's folder, the folder with DeepSpeed's `latest` (a run's, or the Trainer's checkpoint-N), or a
    folder with several checkpoint-N, of which the highest number is taken.
    """
    with reading(path, WHAT):
        if not path.is_dir():
            raise need("checkpoint", WHAT, str(path), "check the path")
        folder = _tag_folder(path)
    with reading(folder, WHAT):
        trainer = next((place for place in (folder, folder.parent) if (place / TRAINER_STATE).is_file()), None)
        model, optimizer, bf16 = _rank_files(folder)
        whole = bool(optimizer) or (folder / UNIVERSAL_FOLDER).is_dir()
    if not whole:
        got = f"{folder} without any rank's optim_states.pt"
        raise need("checkpoint", "a ZeRO checkpoint (stage 1, 2 or 3, or a universal one)", got, _WHOLE)
    return CheckpointFiles(folder, trainer, tuple(model), tuple(optimizer), bf16)


def is_checkpoint(path: Path) -> bool:
    """Whether `find_checkpoint` has something to begin with there; raises `UserError` where that cannot be seen."""
    with reading(path, WHAT):
        return path.is_dir() and (
            _is_tag_folder(path) or any((path / name).is_file() for name in (LATEST, LATEST_UNIVERSAL))
        )


def _tag_folder(path: Path) -> Path:
    if _is_tag_folder(path):
        return path
    for name in (LATEST, LATEST_UNIVERSAL):
        if (path / name).is_file():
            return _named_folder(path / name)
    numbered = {int(found[1]): child for child in path.iterdir() if (found := _TRAINER_FOLDER.fullmatch(child.name))}
    if not numbered:
        got = f"{path} with neither {LATEST} nor the files of a rank"
        raise need("checkpoint", WHAT, got, "name the folder that save_checkpoint got")
    newest = numbered[max(numbered)]
    if not is_checkpoint(newest):
        got = f"{newest} without {LATEST}"
        advice = "DeepSpeed did not save there, or not to the end: name an earlier one"
        raise need("checkpoint", "a DeepSpeed checkpoint in the newest checkpoint-N", got, advice)
    return _tag_folder(newest)


def _is_tag_folder(path: Path) -> bool:
    return any(_MODEL.fullmatch(child.name) or _OPTIMIZER.fullmatch(child.name) for child in path.iterdir())


def _named_folder(file: Path) -> Path:
    """The folder that `latest` names, which is beside it."""
    with file.open("rb") as opened:
        text = opened.read(1024).decode("utf-8", "replace").strip()
    folder = file.parent / text if _TAG.fullmatch(text) else None
    if folder is None or not folder.is_dir():
        raise need("checkpoint", f"the name of a folder beside it in {file}", shown(text), _WHOLE)
    return folder


def _rank_files(folder: Path) -> tuple[list[Path], list[Path], bool]:
    """The files of the model and of the optimizer by rank, and whether their names say bf16."""
    model: dict[int, Path] = {}
    optimizer: dict[int, Path] = {}
    prefixes = set()
    for child in sorted(folder.iterdir()):
        kind, other = _MODEL.fullmatch(child.name), _OPTIMIZER.fullmatch(child.name)
        found = kind or other
        if _PARALLEL.fullmatch(child.name) or (found and found["part"] != "00"):
            raise need("checkpoint", "no tensor, pipeline or expert parallelism", str(child), _MERGED)
        if found is None:
            continue
        ranks = model if kind else optimizer
        rank = int(found["rank"] or 0)
        if rank in ranks:
            raise need("checkpoint", "one file a rank", f"{ranks[rank].name} and {child.name} in {folder}", _WHOLE)
        ranks[rank] = child
        if other:
            prefixes.add(other["bf16"])
    _refuse_gaps(folder, "model_states.pt", model)
    _refuse_gaps(folder, "optim_states.pt", optimizer)
    if not model:
        raise need("checkpoint", "rank 0's model_states.pt", f"none in {folder}", _WHOLE)
    if len(prefixes) > 1:
        raise need("checkpoint", "the files of one save", f"some with bf16_ and some without in {folder}", _WHOLE)
    return _by_rank(model), _by_rank(optimizer), prefixes == {"bf16_"}


def _by_rank(files: dict[int, Path]) -> list[Path]:
    return [files[rank] for rank in sorted(files)]


def _refuse_gaps(folder: Path, what: str, ranks: Iterable[int]) -> None:
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))[:5]
    if missing:
        got = f"none of rank {', '.join(map(str, missing))} in {folder}"
        raise need("checkpoint", f"a {what} of every rank", got, _WHOLE)
