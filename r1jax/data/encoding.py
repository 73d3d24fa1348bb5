"""Tokens of rendered rows and the mask of those that are trained on.

A row is tokenised once, as a whole. A token is trained on when its last character lies in a trained range of the
text, so a token that straddles the start of the completion is trained on, and none that lies wholly in the prompt is.
The last character, not any, because byte-level tokenizers may trim offsets: a run of spaces has an empty range then.
A row that is not cut must teach the model to stop: one whose trained tokens lack the stop token is an error.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from r1jax.config.errors import need
from r1jax.data.formats import RowFormat
from r1jax.data.messages import RowError
from r1jax.data.pretokenised import read_tokens
from r1jax.data.rendering import Rendered, render
from r1jax.data.streams import Row
from r1jax.data.templates import check_tokenizer

Encoded = tuple[list[int], np.ndarray, bool]
"""Tokens and mask of a row, and whether it begins with its prompt's tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """The rows of one chunk that have something to train on, laid end to end, and what happened to the others."""

    tokens: np.ndarray
    """int32 [sum of lengths]"""
    loss_mask: np.ndarray
    """bool [sum of lengths]: train on this token; never on a row's first."""
    lengths: np.ndarray
    """int32 [rows kept]"""
    fates: np.ndarray
    """uint8 [rows of the chunk]: what happened to each, the sum of those below; 0 is a row that is here as it was."""


DROPPED = 1
"""No token to train on, after the cut to max_length: the row is not among those kept."""
TRUNCATED = 2
"""Longer than max_length; its end, stop token included, is lost."""
UNALIGNED = 4
"""Its prompt, tokenised alone as at generation, is not how the row begins."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowEncoder:
    """Turns rows into tokens and masks; holds nothing of a device, so it can travel to a worker process."""

    tokenizer: PreTrainedTokenizerBase
    row_format: RowFormat
    max_length: int | None
    """Tokens of a row that are kept, from its start; None keeps all."""

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.row_format)

    def encode(self, rows: Sequence[Row], first_index: int = 0, *, field: str = "dataset_name") -> EncodedRows:
        """Tokens and masks of a chunk of rows.

        `first_index` is the number of the first, `field` the config key that names them, both for error messages.
        """
        whole = self._read if self.row_format.kind == "tokens" else self._write
        kept_tokens, kept_masks, fates = [], [], []
        for tokens, mask, aligned in whole(rows, first_index, field):
            truncated = self.max_length is not None and len(tokens) > self.max_length
            mask = mask[: self.max_length]
            fates.append(DROPPED * (not mask.any()) | TRUNCATED * truncated | UNALIGNED * (not aligned))
            if not fates[-1] & DROPPED:
                kept_tokens.append(np.asarray(tokens[: self.max_length], np.int32))
                kept_masks.append(mask)
        return EncodedRows(
            tokens=np.concatenate(kept_tokens or [np.zeros(0, np.int32)]),
            loss_mask=np.concatenate(kept_masks or [np.zeros(0, bool)]),
            lengths=np.asarray([len(tokens) for tokens in kept_tokens], np.int32),
            fates=np.asarray(fates, np.uint8),
        )

    def _read(self, rows: Sequence[Row], first_index: int, field: str) -> Iterator[Encoded]:
        """Tokens and mask of rows that are tokens already."""
        num_tokens = max(self.tokenizer.get_vocab().values()) + 1
        for i, row in enumerate(rows):
            with self._row_errors(first_index + i, field):
                tokens, mask = read_tokens(row, self.row_format, num_tokens)
            yield tokens, mask, True

    def _write(self, rows: Sequence[Row], first_index: int, field: str) -> Iterator[Encoded]:
        """Tokens and mask of each row, and whether it begins with its prompt's tokens."""
        rendered = []
        for i, row in enumerate(rows):
            with self._row_errors(first_index + i, field):
                rendered.append(render(row, self.row_format, self.tokenizer))
        token_lists, ends = self._tokenise([r.text for r in rendered])
        prompts = self._prompt_tokens(rendered)
        for i, (r, tokens, end, prompt) in enumerate(zip(rendered, token_lists, ends, prompts, strict=True)):
            mask = trained_tokens(end, r.trained)
            if self.max_length is None or len(tokens) <= self.max_length:
                self._check_stop(r, tokens, end, mask, first_index + i, field)
            yield tokens, mask, tokens[: len(prompt)] == prompt

    @contextlib.contextmanager
    def _row_errors(self, index: int, field: str) -> Iterator[None]:
        """Turns a RowError into the UserError that names the row."""
        try:
            yield
        except RowError as error:
            columns = " and ".join(self.row_format.columns)
            rule = f"{columns} that can be {'read' if self.row_format.kind == 'tokens' else 'written out'}"
            raise need(field, rule, f"row {index}", str(error)) from error

    def _check_stop(
        self, r: Rendered, tokens: list[int], ends: np.ndarray, mask: np.ndarray, index: int, field: str
    ) -> None:
        """Raise UserError when a whole row does not train the token that says when to stop.

        Where the model has the last word, that is the last token trained on, but for white space that the template
        puts behind it. Elsewhere it has to be among those trained on.
        """
        trained = np.flatnonzero(mask)
        if len(trained) == 0:
            return
        stop, last = self.tokenizer.eos_token_id, len(trained) - 1
        while last > 0 and not r.text[ends[trained[last] - 1] : ends[trained[last]]].strip():
            last -= 1
        candidates = trained[last : last + 1] if r.ends_with_answer else trained
        if not any(tokens[at] == stop for at in candidates):
            rule = f"rows that train their stop token {self.tokenizer.eos_token}"
            advice = "take the row out, or set a chat_template that writes the token after every answer"
            raise need(field, rule, f"row {index} without", advice)

    def _tokenise(self, texts: list[str]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Token ids of each text, and for each token the index after its last character."""
        encoded = self.tokenizer(
            texts,
            # A template writes the special tokens itself; a plain text gets what the tokenizer adds (a BOS, say).
            add_special_tokens=not self.row_format.conversational,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it warns of rows beyond the model's length, which are cut below
        )
        ends = [np.asarray([end for _, end in row], np.int64) for row in encoded["offset_mapping"]]
        return encoded["input_ids"], ends

    def _prompt_tokens(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """The tokens that each row's prompt has when it stands alone; empty for a row without prompt."""
        if any(r.prompt is None for r in rendered):
            return [[] for _ in rendered]
        return self._tokenise([r.prompt or "" for r in rendered])[0]


def trained_tokens(ends: np.ndarray, trained: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [T]: which tokens to train on, given the index after each token's last character; never the first token."""
    mask = np.zeros(len(ends), bool)
    for start, stop in trained:
        mask |= (start < ends) & (ends <= stop)
    mask[:1] = False
    return mask
