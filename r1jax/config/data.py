"""The rows that are trained on: where they come from, which columns are read, how they fill sequences."""

from dataclasses import dataclass
from typing import Literal

from r1jax.config.errors import at_least, require

PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset_name: str | None = None
    """Hub id, a folder of <split>.jsonl|.parquet files, a saved datasets folder, or one data file."""

    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset; null is its default one."""

    dataset_train_split: str = "train"
    """Split of dataset_name that is trained on."""

    dataset_test_split: str = "test"
    """Split of dataset_name that is evaluated on."""

    dataset_train_file: str | None = None
    """Local .jsonl, .json, .parquet or .arrow file that is trained on instead of dataset_train_split."""

    dataset_test_file: str | None = None
    """Local .jsonl, .json, .parquet or .arrow file that is evaluated on instead of dataset_test_split."""

    dataset_streaming: bool = False
    """Read rows one after the other and tokenise them on the way; no copy of them is made on the disk."""

    dataset_prompt_column: str = "prompt"
    """Column with the prompt."""

    dataset_completion_column: str = "completion"
    """Column with the completion of prompt/completion rows."""

    dataset_text_field: str = "text"
    """Column of plain text rows."""

    system_prompt: str | None = None
    """GRPO: system message before each prompt; it does not change SFT rows, as in open-r1."""

    max_length: int | None = 1024
    """Longest sequence in tokens, cut at the end; null means no cut."""

    packing: bool = False
    """Fill each row with several documents, kept apart by segment ids; a step then has the same number of rows."""

    packing_strategy: PackingStrategy = "bfd"
    """bfd: best fit, documents cut to max_length; bfd_split: these cut in pieces; wrapped: end to end, cut anywhere."""

    dataset_num_proc: int | None = None
    """Parallel workers that tokenise; null lets r1jax choose."""

    def __post_init__(self) -> None:
        at_least("max_length", self.max_length, 2, "a sequence needs a token to read and one to predict; null = no cut")
        at_least("dataset_num_proc", self.dataset_num_proc, 1, "remove the key to let r1jax choose")
        bounded = not self.packing or self.max_length is not None
        require(bounded, "max_length", "a number when packing is true", self.max_length, "set max_length")
        self._check_names()

    def _check_names(self) -> None:
        names = {
            "dataset_name": self.dataset_name,
            "dataset_train_file": self.dataset_train_file,
            "dataset_test_file": self.dataset_test_file,
            "dataset_train_split": self.dataset_train_split,
            "dataset_test_split": self.dataset_test_split,
            "dataset_prompt_column": self.dataset_prompt_column,
            "dataset_completion_column": self.dataset_completion_column,
            "dataset_text_field": self.dataset_text_field,
        }
        for field, value in names.items():
            require(value is None or bool(value.strip()), field, "a name", value, "write a name or remove the key")
