"""A directory's tokenizer, which an export gets as copies of its files."""

import shutil
from pathlib import Path

from r1jax.config.errors import need


class TokenizerFiles:
    """The files of a tokenizer, and the ids that an export asks it for.

    Loading and saving would rewrite them: transformers 5.23 takes every tokenizer beside a qwen2 config for a
    Qwen2Tokenizer and saves it as one.
    """

    NAMES = (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
        "additional_chat_templates",
    )

    def __init__(self, paths: list[Path]) -> None:
        # Imported here: transformers takes seconds, which a usage error should not wait for.
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(paths[0].parent)
        except (OSError, ValueError) as error:
            what = (str(error).strip().splitlines() or ["it cannot be read"])[0]
            raise need("model_name_or_path", "a tokenizer that can be read", str(paths[0].parent), what) from error
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self._paths = paths

    def save_pretrained(self, directory: Path) -> None:
        """Copies the files."""
        for path in self._paths:
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            else:
                shutil.copyfile(path, directory / path.name)

    def content(self) -> dict[str, bytes]:
        """The files' content by name, folders left out."""
        return {path.name: path.read_bytes() for path in self._paths if path.is_file()}


def tokenizer_in(directory: Path | None) -> TokenizerFiles | None:
    """The directory's tokenizer, or None where there is none."""
    if directory is None:
        return None
    paths = [directory / name for name in TokenizerFiles.NAMES if (directory / name).exists()]
    return TokenizerFiles(paths) if paths else None
