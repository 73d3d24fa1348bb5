"""Every sample that a run has accepted from a server, on disk before it is used.

A server draws the same request otherwise when other requests stand beside it, so a run that goes on from a checkpoint
could not draw again what it was trained on. It takes the samples from here and asks for those that are missing.

    output_dir/journal/GENERATION-PROCESS.jsonl     one object a sample

A sample is taken where its request is the same to the last token and its weights are the same to the last bit: those of
the policy now, or those that the checkpoint says its next generation was being drawn with.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.config.folders import writing
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_requests import Piece, Sample, group_seed, request_digest

logger = logging.getLogger(__name__)

FOLDER = "journal"
_NAME = re.compile(r"(\d+)-\d+\.jsonl")


@dataclasses.dataclass(frozen=True)
class Label:
    """Weights, by the update that wrote them and by their bits."""

    version: int
    weights: str
    """See models/fingerprint.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """An accepted sample."""

    prompt_id: int
    number: int
    """Among the samples of its prompt."""
    request: str
    """`vllm_requests.request_digest`; no other sample of a run has it."""
    label: Label
    sample: Sample


class Journal:
    """The journal of one process; it reads what others have written too, as a run may go on with other processes."""

    def __init__(self, folder: Path, process: int = 0, *, vouched: Label | None = None) -> None:
        """vouched: what the checkpoint's next generation was being drawn with."""
        self._folder, self._process, self._vouched = folder, process, vouched

    def append(self, generation: int, entries: Iterable[Entry]) -> None:
        """Writes; a process that is killed afterwards loses nothing. Raises `RunFailure` for a disk that is full."""
        path = self._folder / f"{generation}-{self._process}.jsonl"
        lines = "".join(json.dumps(_as_json(entry)) + "\n" for entry in entries)
        with writing("output_dir", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                # A write that was cut off by a kill must not take the next line with it.
                broken = file.tell() and _last_byte(path) != b"\n"
                file.write((("\n" if broken else "") + lines).encode())

    def taken(self, generation: int, labels: Collection[Label | None]) -> dict[str, Sample]:
        """The generation's samples, by their requests, that weights with one of these labels have drawn."""
        believed = {*labels, self._vouched}
        found = {
            entry.request: entry.sample
            for path in sorted(self._folder.glob(f"{generation}-*.jsonl"))
            for entry in _entries(path)
            if entry.label in believed
        }
        if found:
            logger.info("journal: %d samples of generation %d are there already", len(found), generation)
        return found

    def discard_before(self, generation: int) -> None:
        """Removes what no run can need that goes on from this generation or later; the first process calls it."""
        for path in self._folder.glob("*.jsonl"):
            if (name := _NAME.fullmatch(path.name)) and int(name[1]) < generation:
                path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes everything."""
        for path in self._folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()


class Page:
    """A generation's part of the journal; of no journal, it knows nothing and keeps nothing."""

    def __init__(
        self,
        journal: Journal | None,
        label: Label | None,
        earlier: Label | None,
        step: int,
        settings: SamplingSettings,
    ) -> None:
        self._journal, self._label, self._step, self._settings = journal, label, step, settings
        self._taken = journal.taken(step, {label, earlier} - {None}) if journal is not None else {}

    def known(self, prompt: Sequence[int], prompt_id: int, num_generations: int) -> dict[int, Sample]:
        """The prompt's samples that are there already, by their number."""
        if not self._taken:
            return {}
        requests = {number: self._request(prompt, prompt_id, number) for number in range(num_generations)}
        return {number: self._taken[key] for number, key in requests.items() if key in self._taken}

    def accept(self, piece: Piece, samples: list[Sample]) -> None:
        """Keeps the samples."""
        if self._journal is None or self._label is None:
            return
        entries = [
            Entry(
                prompt_id=piece.prompt_id,
                number=number,
                request=self._request(piece.prompt, piece.prompt_id, number),
                label=self._label,
                sample=sample,
            )
            for number, sample in enumerate(samples, start=piece.first)
        ]
        self._journal.append(self._step, entries)

    def _request(self, prompt: Sequence[int], prompt_id: int, number: int) -> str:
        seed = group_seed(self._settings.seed, self._step, prompt_id) + number
        return request_digest(prompt, self._settings, seed)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)


def _as_json(entry: Entry) -> dict[str, Any]:
    sample = entry.sample
    return {
        "prompt": entry.prompt_id,
        "number": entry.number,
        "request": entry.request,
        "version": entry.label.version,
        "weights": entry.label.weights,
        "finish_reason": sample.finish_reason,
        "token_ids": sample.token_ids.tolist(),
        # float32 as decimal float64: what comes back has the same bits.
        "logprobs": sample.logprobs.tolist(),
    }


def _entries(path: Path) -> Iterator[Entry]:
    """The lines that are whole."""
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            yield _entry(row)
        except (ValueError, KeyError, TypeError, OverflowError):
            logger.warning("journal: a line of %s was cut off; its sample is drawn again", path.name)


def _entry(row: dict[str, Any]) -> Entry:
    tokens: Sequence[int] = row["token_ids"]
    logprobs: Sequence[float] = row["logprobs"]
    if len(tokens) != len(logprobs):
        raise ValueError("a log-probability for each token")
    return Entry(
        prompt_id=int(row["prompt"]),
        number=int(row["number"]),
        request=str(row["request"]),
        label=Label(int(row["version"]), str(row["weights"])),
        sample=Sample(
            token_ids=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            finish_reason=row["finish_reason"],
            version=int(row["version"]),
        ),
    )
