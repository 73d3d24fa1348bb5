"""Where a model's files are: a local directory as it stands, or a hub repository fetched into the hub's cache.

First station of every command that takes `model_name_or_path`; what comes back is read by `hf.py` and by transformers.
"""

import re
from pathlib import Path

from r1jax.config.errors import UserError, need

# Weights as safetensors, every json, and what tokenizers of the three families are made of: no .bin, .gguf or .onnx.
WANTED_FILES = [
    "*.json",
    "model*.safetensors",
    "adapter_model.safetensors",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
]
# Repositories keep other formats of the same model in folders (original/, onnx/).
UNWANTED_FILES = ["*/*"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether the name could be a hub repository: `org/name` or `name`, and nothing that only a path has."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith((".", "~"))


def resolve(name_or_path: str, revision: str = "main", *, field: str = "model_name_or_path") -> Path:
    """The local directory with the model's files; a hub id is fetched into the hub's cache if it is not there yet.

    `field` is the key that the user wrote, for the message. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN count as everywhere.
    Raises `UserError` for a directory without config.json (or adapter_config.json, as an adapter's has) and for a
    repository that is missing, gated, without that revision, out of reach or, offline, not in the cache. Every process
    may call it: the cache has locks.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _checked(path, name_or_path, field)
    if path.exists():
        raise need(field, "a directory", f"the file {name_or_path}", "give the directory that holds it")
    if not is_hub_id(name_or_path):
        advice = f"check the path (looked from {Path.cwd()})"
        raise need(field, "a directory that exists or a hub id", name_or_path, advice)
    return _checked(_download(name_or_path, revision, field), name_or_path, field)


def _checked(directory: Path, name: str, field: str) -> Path:
    if any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        return directory
    advice = "give the directory of a model in Hugging Face format"
    if (directory / "checkpoints").is_dir():
        advice = (
            f"this is a run that exported nothing; `python -m r1jax.convert {name} DIR --to hf` makes a model of it"
        )
    raise need(field, "a directory with config.json", f"{name} without one", advice)


def _download(repo: str, revision: str, field: str) -> Path:
    """The snapshot's directory; every way the hub has of failing becomes one line that says what to do."""
    # Imported here: a run from a local directory needs no HTTP client.
    from huggingface_hub import errors, snapshot_download

    def refusal(rule: str, what: str, advice: str) -> UserError:
        return need(field, rule, f"{repo}, which {what}", advice)

    here = f"no directory {repo} is here either"
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES)
        )
    except errors.GatedRepoError as error:
        what = "is gated and not open to this account"
        advice = f"ask for access on its page https://huggingface.co/{repo}, then set HF_TOKEN or run `hf auth login`"
        raise refusal("a hub model that you may read", what, advice) from error
    except errors.RepositoryNotFoundError as error:
        what = "is not on the hub, or is private"
        raise refusal("a model that exists", what, f"check the spelling, or set HF_TOKEN ({here})") from error
    except errors.RevisionNotFoundError as error:
        what = f"has no revision {revision}"
        raise refusal("a revision that exists", what, "set model_revision to a branch, tag or commit of it") from error
    except errors.HFValidationError as error:
        raise refusal("a hub id like org/name", "is not one", here) from error
    except errors.LocalEntryNotFoundError as error:
        raise refusal("a model within reach", *_out_of_reach(error, here)) from error
    # HTTPError: that of the HTTP client, whichever the installed hub client uses; it covers time-outs and broken
    # connections, and with HfHubHTTPError below it every status.
    except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]
        what = f"could not be fetched ({type(error).__name__}: {_first_line(error)})"
        raise refusal("a model within reach", what, "try again, or fetch it beforehand with `hf download`") from error


def _out_of_reach(error: Exception, here: str) -> tuple[str, str]:
    """What happened and what to do when the files are not all in the cache and the hub cannot be asked."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        advice = "fetch it with `hf download` where there is a network, unset HF_HUB_OFFLINE, or give a local directory"
        return "is not (wholly) in the cache while HF_HUB_OFFLINE is set", f"{advice} ({here})"
    reason = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
    advice = "check the connection and proxy, fetch it beforehand with `hf download`, or give a local directory"
    return f"is not (wholly) in the cache and the hub cannot be reached{reason}", f"{advice} ({here})"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else "no message"
