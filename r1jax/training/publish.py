"""What of a run goes to the hub, and when. Uploads run behind the training, which they can neither stop nor change.

The first process uploads; all take part in the exports, which gather the weights.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from r1jax import progress
from r1jax.checkpoints.orbax import FOLDER
from r1jax.checkpoints.repository import PushFailed, Repository, Upload
from r1jax.config.errors import need
from r1jax.config.schema import RunConfig
from r1jax.training.agreement import first_says
from r1jax.training.push_queue import PushQueue, bounded

logger = logging.getLogger(__name__)

STAGING = ".hub"
"""Folder in output_dir with what waits for its upload."""

# A save's export waits on disk for its turn: a hub that hangs must not fill it.
_MOST_WAITING = 4
_LOOK_SECONDS = 30.0
_POLL_SECONDS = 0.2
_SHARED, _OWN_BRANCH = 1, 2


class Publisher:
    """The pushes of one run; does nothing where none is asked for."""

    def __init__(self, config: RunConfig) -> None:
        self._settings = settings = config.checkpoint
        self._seconds = config.run.hub_timeout
        self._output_dir = Path(config.run.output_dir)
        self._staging = self._output_dir / STAGING
        # open-r1 makes the repository of its branches private; transformers leaves it to the account.
        private = True if settings.hub_private_repo is None and not settings.push_to_hub else settings.hub_private_repo
        name = settings.hub_model_id or self._output_dir.absolute().name
        self._repository = Repository(name=name, private=private, token=settings.hub_token)
        self._queue = PushQueue(self._repository, self._seconds)
        self._left_out = 0

    def metrics(self) -> dict[str, float]:
        """Pushes so far by how they ended; empty where nothing is published."""
        if not self._settings.publishes:
            return {}
        counts = (self._queue.num_done, self._queue.num_failed, self._left_out)
        names = ("hub/pushes", "hub/failed_pushes", "hub/skipped_pushes")
        return {name: float(count) for name, count in zip(names, counts, strict=True)}

    def refuse_taken_branch(self) -> None:
        """Nothing, or the UserError of push_to_hub_revision where the branch holds a model; for a run that starts.

        A hub that does not answer is a warning: the run is worth more than the check.
        """
        settings, taken = self._settings, False
        if not settings.push_to_hub_revision or settings.overwrite_hub_revision:
            return
        if jax.process_index() == 0:
            try:
                seconds = min(_LOOK_SECONDS, self._seconds)
                taken = bounded(lambda: self._repository.holds_model(settings.hub_model_revision), seconds)
            except PushFailed as error:
                logger.warning("hub: whether %s is free is not known (%s)", settings.hub_model_revision, error)
        if first_says(int(taken)):
            got = f"{settings.hub_model_revision} of {self._repository.name}, which has a README.md"
            advice = "name another, or set overwrite_hub_revision: true"
            raise need("hub_model_revision", "a branch without a model for push_to_hub_revision", got, advice)

    def start(self) -> None:
        """Makes the repository, so that a wrong token is heard of now and not after the training."""
        if not self._settings.publishes or jax.process_index() != 0:
            return
        shutil.rmtree(self._staging, ignore_errors=True)

        def create() -> None:
            try:
                logger.info("hub: models go to %s", bounded(self._repository.create, self._seconds))
            except PushFailed as error:
                logger.warning("hub: %s is out of reach (%s); the run goes on", self._repository.name, error)

        threading.Thread(target=create, name="hub-start", daemon=True).start()

    def save(self, step: int, export: Callable[[Path], Any]) -> None:
        """Begins the push of a save, if one is due; `export` writes the model of now into a folder.

        Every process calls it, after `Checkpoints.save`. It returns when the model is on disk.
        """
        if not (self._pushes_saves or self._settings.callbacks):
            return
        chosen = first_says(self._choose(step) if jax.process_index() == 0 else 0)
        if not chosen:
            return
        folder, revision = self._staging / str(step), self._settings.hub_model_revision
        export(folder / "model")
        if jax.process_index() != 0:
            return
        uploads: list[Upload] = []
        if chosen & _SHARED:
            uploads.append(Upload(folder / "model", revision, f"Training in progress, step {step}"))
        if chosen & _OWN_BRANCH:
            branch = f"{revision}-step-{step:09d}"
            uploads.append(Upload(folder / "model", branch, f"Model of step {step}"))
        with_checkpoint = chosen & _SHARED and self._settings.hub_strategy != "every_save"
        self._queue.push(
            f"step {step}", lambda: uploads + (self._checkpoints(step, folder) if with_checkpoint else []), folder
        )

    def finish(self) -> None:
        """Pushes the finished model and returns when all pushes have ended, which they do within their time."""
        settings, first = self._settings, jax.process_index() == 0
        if not settings.publishes:
            return
        if first and (settings.push_to_hub or settings.push_to_hub_revision):
            upload = Upload(self._output_dir, settings.hub_model_revision, "End of training")
            self._queue.push("the finished model", lambda: [upload], self._staging / "end")
        if num_waiting := self._queue.num_waiting():
            logger.info("hub: waiting for %d pushes, at most %g s each", num_waiting, self._seconds)
        # The others wait too, a moment at a time: a process that ends early ends the whole run.
        while first_says(self._queue.num_waiting()):
            progress.report("uploads")  # each push has its own deadline, hub_timeout
            self._queue.wait(1.0)
        if first:
            shutil.rmtree(self._staging, ignore_errors=True)
            done, failed = self._queue.num_done, self._queue.num_failed
            level = logging.WARNING if failed else logging.INFO
            words = (done, failed, self._left_out, self._repository.name)
            logger.log(level, "hub: %d pushes done, %d failed, %d left out (%s)", *words)

    @property
    def _pushes_saves(self) -> bool:
        return self._settings.push_to_hub and self._settings.hub_strategy != "end"

    def _choose(self, step: int) -> int:
        """Which pushes of a save begin, as bits."""
        waiting = self._queue.num_waiting()
        if waiting >= _MOST_WAITING:
            self._left_out += 1
            logger.warning("hub: step %d is left out, %d pushes are waiting already", step, waiting)
            return 0
        shared = self._pushes_saves and (waiting == 0 or self._settings.hub_always_push)
        if self._pushes_saves and not shared:
            self._left_out += 1
            logger.info("hub: step %d is left out, an earlier push is not through (hub_always_push queues)", step)
        return (_SHARED if shared else 0) | (_OWN_BRANCH if self._settings.callbacks else 0)

    def _checkpoints(self, step: int, folder: Path) -> list[Upload]:
        """The checkpoints that go up with a save, linked into `folder`: save_total_limit may drop them meanwhile."""
        latest, branch = self._settings.hub_strategy == "checkpoint", self._settings.hub_model_revision
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            steps = [int(path.name) for path in (self._output_dir / FOLDER).iterdir() if path.name.isdigit()]
            if max(steps, default=-1) < step:  # is being written
                time.sleep(_POLL_SECONDS)
                continue
            # Not the last alone: those of saves that were left out, too.
            paths = {f"{FOLDER}/{one}" for one in ([max(steps)] if latest else steps)} - self._queue.sent
            linked = sorted(path for path in paths if link_tree(self._output_dir / path, folder / path))
            if latest and linked:
                # A folder of checkpoints, as resume_from_checkpoint takes it.
                return [Upload(folder / FOLDER, branch, f"Add last-checkpoint: {linked[0]}", path="last-checkpoint")]
            if not latest:
                return [Upload(folder / path, branch, f"Add {path}", path=path) for path in linked]
        raise PushFailed(f"checkpoint {step} was not written within {self._seconds:g} s")


def link_tree(source: Path, target: Path) -> bool:
    """Whether target now is source with the same files, which last when source is deleted: False where it was gone."""

    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            shutil.copyfile(one, other)
        return other

    try:
        shutil.copytree(source, target, copy_function=link)
    except (FileNotFoundError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        return False
    return True
