"""A hub repository that models are published to: the calls of huggingface_hub that a push is made of.

Each call blocks and may hang: `training/publish.py` runs them in threads that it does not wait for without end.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from r1jax.checkpoints.hub import UNWANTED_FILES, WANTED_FILES
from r1jax.config.errors import HIDDEN

MODEL_PATTERNS = [*WANTED_FILES, "README.md"]
"""The files of an export; whatever else its folder holds is not uploaded."""

Result = TypeVar("Result")


class PushFailed(Exception):
    """The hub did not do what it was asked for; one line."""


@dataclasses.dataclass(frozen=True)
class Upload:
    """A folder that becomes part of a branch."""

    folder: Path
    branch: str
    message: str
    path: str = ""
    """Where in the repository; "" for a model, of whose folder only `MODEL_PATTERNS` go up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """A model repository. Its calls raise `PushFailed`."""

    name: str
    """org/name, or name: then of the token's owner."""
    private: bool | None
    """Where it has to be made; None: as the owner's account has it."""
    token: str | None

    def create(self) -> str:
        """The full name; the repository is there then."""
        return self._call(lambda hub: hub.create_repo(self.name, private=self.private, exist_ok=True).repo_id)

    def holds_model(self, branch: str) -> bool:
        """Whether the branch is there and has a README.md, as every published model has."""

        def look(hub: Any) -> bool:
            from huggingface_hub import errors

            name = self.name if "/" in self.name else f"{hub.whoami()['name']}/{self.name}"
            try:
                return "README.md" in hub.list_repo_files(name, revision=branch)
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
                return False

        return self._call(look)

    def upload(self, upload: Upload) -> None:
        """Returns when the folder is committed; the repository and the branch are made if need be.

        What an earlier upload to that place left there, and this one has not, is removed.
        """
        name = self.create()
        model = not upload.path

        def push(hub: Any) -> None:
            if upload.branch != "main":
                # From the first commit, which is empty: main's files do not belong there.
                first = hub.list_repo_commits(name)[-1].commit_id
                hub.create_branch(name, branch=upload.branch, revision=first, exist_ok=True)
            hub.upload_folder(
                repo_id=name,
                folder_path=upload.folder,
                path_in_repo=upload.path,
                revision=upload.branch,
                commit_message=upload.message,
                allow_patterns=MODEL_PATTERNS if model else None,
                ignore_patterns=list(UNWANTED_FILES) if model else None,
                delete_patterns=["model*.safetensors", "model.safetensors.index.json"] if model else ["*"],
            )

        self._call(push)

    def _call(self, function: Callable[[Any], Result]) -> Result:
        # Imported here: a run that publishes nothing needs no HTTP client.
        from huggingface_hub import HfApi, errors
        from huggingface_hub.utils import disable_progress_bars

        # The bars would tear the run's own; each try that the client repeats would be a warning.
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            return function(HfApi(token=self.token))
        # Besides the client's own errors: OSError of files and sockets, ValueError and LookupError where what came
        # back is not what the hub sends, RuntimeError from the uploader of large files.
        except (errors.HTTPError, OSError, ValueError, LookupError, RuntimeError) as error:  # pyright: ignore[reportPrivateImportUsage]
            raise PushFailed(self._line(error)) from error

    def _line(self, error: Exception) -> str:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        return text.replace(self.token, HIDDEN) if self.token else text
