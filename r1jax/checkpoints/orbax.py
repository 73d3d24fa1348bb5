"""A run's own checkpoints: `output_dir/checkpoints/STEP/`, each a state pytree and a JSON document about it.

The loop saves and resumes through `Checkpoints`; convert reads the parameters alone. Orbax stays behind this file.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from r1jax.checkpoints import integrity
from r1jax.checkpoints.handlers import Failure, registry
from r1jax.checkpoints.lazy import LazyArray
from r1jax.config.errors import need, shown
from r1jax.config.folders import system_error, write_failure, writing

SCHEMA_VERSION = 1
"""Of the state's and the metadata's layout; raised when an older reader would misread a newer checkpoint."""

FOLDER = "checkpoints"
"""Where a run's output_dir keeps them."""

MODEL_FILES = "model"
"""Folder in a checkpoint with what an export of it needs beside the state: tokenizer and generation_config.json."""

# A checkpoint that goes is first moved here, in one move: a kill while its files are deleted leaves no half of it
# under its step's name.
_DELETED = ".deleted"
_UNCOMMITTED = ".orbax-checkpoint-tmp"
"""Orbax's mark in the name of what it has not committed."""

_PARTS_THAT_RAISE = 2
"""Orbax's manager and its checkpointer each raise once, when closed, what went wrong with a save."""


def locate(path: Path) -> tuple[Path, int | None] | None:
    """The folder of checkpoints that a path means, and the step where it names one; None when it means none.

    A path is a run's output_dir, its checkpoints/ or one checkpoints/STEP.
    """
    if _is_step(path):
        return path.absolute().parent, int(path.absolute().name)
    for folder in (path, path / FOLDER):
        if folder.is_dir() and any(_is_step(child) for child in folder.iterdir()):
            return folder.absolute(), None
    return None


def _is_step(path: Path) -> bool:
    named_for_step = re.fullmatch(r"\d+", path.absolute().name) is not None
    return named_for_step and (path / "state").is_dir() and (path / "metadata").is_dir()


class _Kept(PreservationPolicy):
    """Which checkpoints stay: the best one, then the newest, `limit` together, but never fewer than the newest and the
    best (as in transformers)."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.best: int | None = None

    # Orbax's types of these two are protocols that cannot be checked when the tests run.
    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        if self.limit is None or not steps:
            return [True] * len(steps)
        kept = {max(steps)} | ({self.best} & set(steps))
        room = max(self.limit - len(kept), 0)
        kept |= set(sorted((step for step in steps if step not in kept), reverse=True)[:room])
        return [step in kept for step in steps]


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for one thing."""

    def reached_preemption(self, step: int) -> bool:
        """Never. Orbax would ask JAX's preemption service, from a thread, with the number of a step that is long past,
        and the service takes that for where this process is: it then names a step that never comes, and a SIGTERM is
        lost. The loop asks (training/preemption.py)."""
        del step
        return False


class Checkpoints:
    """The checkpoints in one folder. Every process of a run makes one and calls the same methods in the same order."""

    def __init__(
        self,
        directory: Path,
        save_total_limit: int | None = None,
        *,
        read_only: bool = False,
        model_files: Mapping[str, bytes] | None = None,
    ) -> None:
        """`save_total_limit` keeps that many (`keep_best`); `read_only` creates and deletes nothing.

        `model_files`, content by name, go into each checkpoint.
        """
        # Orbax reports each phase of each save through absl, and its errors too, which it also raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = directory.absolute()
        # Saved or restored here, so already what `save` would write; any other step is another run's past.
        self._ours: set[int] = set()
        self.begun: int | None = None
        """The step that was saved last, complete or not."""
        self._read_only, self._cleaned = read_only, False
        self._model_files = dict(model_files or {})
        self._whole: set[int] = set()
        self._kept = _Kept(None if read_only else save_total_limit)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            save_interval_steps=0 if read_only else 1,
            create=False,  # a run that is refused leaves nothing behind: `save` makes the folder
            todelete_subdir=None if read_only else _DELETED,
            read_only=read_only,
            # Folders are made before `save` returns: one that cannot be made would not be told until the next save, and
            # threads that wait for it would keep the process for five minutes after its end.
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._seal, create_directories_asynchronously=False
            ),
        )
        self._failure = Failure()
        handlers = registry(self._failure)
        self._manager = _Manager(self.directory, options=options, handler_registry=handlers)

    def keep_best(self, step: int | None) -> None:
        """From the next save on, this checkpoint is not dropped (None: no one is better than the others)."""
        self._kept.best = step

    def all_steps(self) -> list[int]:
        """The committed checkpoints' steps, ascending; what happened to them since is not looked at."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> bool:
        """Whether a checkpoint was begun: False for a step that this object has saved or restored already.

        Returns when the arrays have left the devices, so that the caller may donate them; files are written behind it,
        and `check`, `wait` or the next `save` raises what went wrong there: `RunFailure` where the system would not
        write. Leaves keep their dtype. A checkpoint of this step that an earlier run left is replaced. Leaves that are
        LazyArrays are loaded, written and forgotten one after another, before it returns.
        """
        assert "params" in _by_path(state, depth=1), "a state has its parameters under a top-level `params`"
        if step in self._ours:
            return False
        self.wait()
        document = {"schema_version": SCHEMA_VERSION, "step": step, **metadata}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(document))
        self.begun = step
        with writing("output_dir", self.directory / str(step)):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
            self._clean()
            if step in self._manager.all_steps():
                self._delete(step)
            self._manager.save(step, args=items, force=True)
        self._ours.add(step)
        return True

    def check(self) -> None:
        """Nothing; raises what has gone wrong behind the last save, without waiting for its end."""
        if (error := self._failure.error) is not None:
            reason = system_error(error)
            raise error if reason is None else write_failure("output_dir", self._target(), reason) from error

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state, laid out as `abstract_state` (ShapeDtypeStructs with shardings, of any mesh), and its metadata.

        Raises `UserError` where the checkpoint is missing or its leaves are not those asked for.
        """
        metadata = self.metadata(step)
        self._refuse_other_leaves(step, _by_path(abstract_state))
        state = self._restore_state(step, abstract_state, partial=False)
        self._ours.add(step)
        return state, metadata

    def check_leaves(self, step: int, abstract_state: Any) -> None:
        """Nothing; raises as `restore` would where the leaves are not those asked for."""
        self._refuse_other_leaves(step, _by_path(abstract_state))

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, whatever else the checkpoint holds; raises as `restore` does."""
        self.metadata(step)
        abstract_state = {"params": abstract_params}
        self._refuse_other_leaves(step, _by_path(abstract_state))
        return self._restore_state(step, abstract_state, partial=True)["params"]

    def lazy(self, step: int) -> Any:
        """The state as nested dicts of LazyArrays; a load reads that leaf alone. Raises as `metadata` does."""
        self.metadata(step)
        saved = self._manager.item_metadata(step)["state"].tree
        args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(LazyArray), saved))
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def metadata(self, step: int) -> dict[str, Any]:
        """The step's JSON document: schema_version, step and what the run saved with it; waits for a save of it.

        Raises `UserError` where the checkpoint is missing, damaged or of an unknown schema.
        """
        self.wait()
        if step not in self._manager.all_steps():
            steps = ", ".join(map(str, self.all_steps())) or "none"
            rule = f"a complete checkpoint in {self.directory} (there: {steps})"
            raise need("resume_from_checkpoint", rule, f"step {step}", "name one that is there")
        if (reason := self.damage(step)) is not None:
            rule, got = "a checkpoint that is whole", f"{self.directory / str(step)} (damaged: {reason})"
            raise need("resume_from_checkpoint", rule, got, "name another, or bring it back from a copy")
        return self._document(step)

    def damage(self, step: int) -> str | None:
        """Why the step cannot be restored, in a few words; None when it is whole.

        Raises `UserError` for a whole document of a schema that this version does not know.
        """
        try:
            document = self._document(step)
        except FileNotFoundError:
            return "metadata is missing"
        except (OSError, ValueError) as error:
            return f"metadata is no JSON document: {error}"
        if not isinstance(document, dict) or document.get("step") != step:
            return f"metadata does not describe step {step}"
        version = document.get("schema_version")
        if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            advice = "a newer r1jax wrote it, use that" if newer else "this r1jax did not write it, name another"
            got = f"{shown(version)} in {self.directory / str(step)}"
            raise need("resume_from_checkpoint", f"schema_version <= {SCHEMA_VERSION}", got, advice)
        if step in self._whole:
            return None
        # Every byte is read by the first process alone: the others take its word for the step to resume from.
        reason = integrity.damage(self.directory / str(step), contents=jax.process_index() == 0)
        if reason is None:
            self._whole.add(step)
        return reason

    def newest_whole(self) -> tuple[int | None, list[str]]:
        """(the newest step that is whole, None without one; what is wrong with each newer one)."""
        damaged = []
        for step in reversed(self.all_steps()):
            reason = self.damage(step)
            if reason is None:
                return step, damaged
            damaged.append(f"checkpoint {step} is damaged ({reason})")
        return None, damaged

    def discard_after(self, step: int) -> None:
        """Deletes every later checkpoint: a run that resumes from `step` makes another future."""
        self.wait()
        self._clean()
        # Newest first: what a kill in between leaves is a run's past without gaps.
        for later in [one for one in reversed(self.all_steps()) if one > step]:
            self._delete(later)
            self._ours.discard(later)

    def wait(self) -> None:
        """Returns when what was saved is complete on disk; raises what went wrong, as `check` does."""
        self.check()
        # Noted here too: not all of Orbax's writing goes through our handlers.
        with writing("output_dir", self._target()), self._failure.noted():
            self._manager.wait_until_finished()
            self._empty_deleted()

    def close(self) -> None:
        """Waits, then ends Orbax's threads.

        After a save that failed, and that has been told, nothing is waited for where there are other processes: Orbax
        would meet them at a barrier, and they may wait for this one elsewhere.
        """
        if self._failure.error is None:
            self.wait()
            self._manager.close()
        elif jax.process_count() == 1:
            for _ in range(_PARTS_THAT_RAISE + 1):
                with contextlib.suppress(Exception):
                    self._manager.close()
                    return

    def _target(self) -> Path:
        """The checkpoint that was begun last."""
        return self.directory / str(self.begun)

    def _document(self, step: int) -> Any:
        return json.loads((self.directory / str(step) / "metadata" / "metadata").read_text(encoding="utf-8"))

    def _seal(self) -> None:
        """Called by Orbax on the first process, when all files are written and nothing is committed."""
        folder = self.directory / f"{self.begun}{_UNCOMMITTED}"
        with self._failure.noted():
            for name, content in self._model_files.items():
                path = folder / MODEL_FILES / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            integrity.seal(folder)

    def _delete(self, step: int) -> None:
        self._manager.delete(step)
        self._whole.discard(step)
        self._empty_deleted()

    def _empty_deleted(self) -> None:
        """Removes what was moved away; never while a save runs, whose end moves more, nor before the first change."""
        if self._cleaned and jax.process_index() == 0:
            shutil.rmtree(self.directory / _DELETED, ignore_errors=True)

    def _clean(self) -> None:
        """Removes, once and before the first change, what a killed process left half-written or half-deleted."""
        assert not self._read_only, "a reader changes nothing"
        if self._cleaned:
            return
        self._cleaned = True
        if jax.process_index() == 0:
            for path in self.directory.glob(f"*{_UNCOMMITTED}*"):
                shutil.rmtree(path)
        self._empty_deleted()

    def _restore_state(self, step: int, abstract_state: Any, *, partial: bool) -> Any:
        args = ocp.args.PyTreeRestore(
            abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            partial_restore=partial,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def _refuse_other_leaves(self, step: int, wanted: dict[str, Any]) -> None:
        """Raises when a leaf is absent or of another shape or dtype: Orbax would cast, or fail without the name."""
        saved = _by_path(self._manager.item_metadata(step)["state"].tree)
        whole = any(not path.startswith("params/") for path in wanted)
        strange = [f"{path} (absent)" for path in wanted if path not in saved]
        strange += [f"{path} (not expected)" for path in saved if whole and path not in wanted]
        for path, leaf in wanted.items():
            if path in saved and _signature(saved[path]) != _signature(leaf):
                strange.append(f"{path} ({_signature(saved[path])}, not {_signature(leaf)})")
        if strange:
            more = f" and {len(strange) - 1} more that differ" if len(strange) > 1 else ""
            got = f"{strange[0]}{more} in {self.directory / str(step)}"
            advice = "resume with the model and optim it was saved with, or choose another output_dir"
            raise need("resume_from_checkpoint", "the leaves of this model and optimizer", got, advice)


def _by_path(tree: Any, depth: int | None = None) -> dict[str, Any]:
    """The leaves by "a/b/c"; with a depth, by that many keys (any one leaf below them)."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path[:depth], simple=True, separator="/"): leaf for path, leaf in leaves}


def _signature(leaf: Any) -> str:
    return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
