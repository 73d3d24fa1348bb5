"""Tokenizers (word level: masks can be marked by hand; byte level: offsets are trimmed), and tokenised rows."""

from collections.abc import Callable
from pathlib import Path

import datasets.config
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from r1jax.data.tokenized import TokenizedRows

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>"]
WORDS = [
    "system",
    "user",
    "assistant",
    "hi",
    " hi",
    " you",
    "yes",
    " no",
    "1",
    "2",
    "12",
    "a",
    " b",
    "c",
    ":",
    "?",
    "\n",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library copies what it reads, r1jax keeps what it tokenises: here in the test's own folder."""
    monkeypatch.setenv("R1JAX_CACHE", str(tmp_path / "r1jax-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word with its space, a line break or a sign; every token decodes to itself."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\n|[^\w\s]"), "isolated")
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with trimmed offsets (a run of spaces has an empty range) that adds a BOS, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the cat sat on the mat    the"] * 4, trainer)
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def make_rows() -> Callable[..., TokenizedRows]:
    """make_rows(lengths): row i holds the tokens 100 i + 1, 100 i + 2, ...; all but its first third is trained on.

    `untrained` says otherwise how many tokens at the start of each row are not.
    """

    def make(lengths: list[int], untrained: int | None = None) -> TokenizedRows:
        masks = [np.arange(length) >= (max(1, length // 3) if untrained is None else untrained) for length in lengths]
        return TokenizedRows(
            tokens=np.concatenate([100 * i + 1 + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]),
            loss_mask=np.concatenate(masks),
            lengths=np.asarray(lengths, np.int32),
            loss_tokens=np.asarray([mask.sum() for mask in masks], np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            num_dropped=0,
            num_truncated=0,
            num_unaligned=0,
        )

    return make
