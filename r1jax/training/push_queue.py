"""Pushes to the hub behind the training: one after the other, each in a thread that gives up after its time."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from r1jax.checkpoints.repository import PushFailed, Repository, Upload

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class PushQueue:
    """The pushes of one process. Nothing that happens to one is raised: it is a warning, and counted."""

    def __init__(self, repository: Repository, seconds: float) -> None:
        """seconds: what one push may take, once the one before it has ended."""
        self._repository = repository
        self._seconds = seconds
        self._threads: list[threading.Thread] = []
        self.num_done = self.num_failed = 0
        self.sent: set[str] = set()
        """Paths in the repository that are there."""

    def num_waiting(self) -> int:
        """Pushes that have not ended, the running one included."""
        return sum(thread.is_alive() for thread in self._threads)

    def wait(self, seconds: float) -> None:
        """Returns when all have ended, or after that time."""
        if self._threads:
            self._threads[-1].join(seconds)

    def push(self, what: str, prepare: Callable[[], list[Upload]], folder: Path) -> None:
        """Begins a push; `prepare` says at once, in its thread, what goes up, and `folder` is deleted at the end."""
        before = self._threads[-1] if self._threads else None
        arguments = (what, prepare, folder, before)
        self._threads.append(threading.Thread(target=self._run, args=arguments, name="hub-push", daemon=True))
        self._threads[-1].start()

    def _run(
        self, what: str, prepare: Callable[[], list[Upload]], folder: Path, before: threading.Thread | None
    ) -> None:
        try:
            uploads = prepare()
            if before is not None:
                before.join()
            bounded(lambda: [self._repository.upload(upload) for upload in uploads], self._seconds)
        except PushFailed as error:
            self.num_failed += 1
            logger.warning("hub: pushing %s to %s failed (%s)", what, self._repository.name, error)
        else:
            self.num_done += 1
            self.sent |= {upload.path for upload in uploads}
            logger.info("hub: pushed %s to %s", what, self._repository.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def bounded(call: Callable[[], Result], seconds: float) -> Result:
    """What the call returns. Raises `PushFailed` when it raises that, or is not back in time; it is left alone then."""
    results: list[Result | PushFailed] = []

    def work() -> None:
        try:
            results.append(call())
        except PushFailed as error:
            results.append(error)

    # No pool: its threads are waited for when the interpreter ends, a hanging one for ever.
    thread = threading.Thread(target=work, name="hub-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise PushFailed(f"no answer within {seconds:g} s" if thread.is_alive() else "it broke off, see above")
    if isinstance(results[0], PushFailed):
        raise results[0]
    return results[0]
