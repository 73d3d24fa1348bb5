"""The tokenizer with its chat template: where both come from, what ends a turn, and conversations written out.

The template must write one special token after the assistant's words, and that token must be the tokenizer's EOS: it is
what the model learns to stop with, and what samplers wait for.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r1jax.config.errors import need
from r1jax.data.formats import RowFormat
from r1jax.data.messages import Message, RowError

CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    f"{{{{ '{CHATML_START}' + message['role'] + '\\n' + message['content'] + '{CHATML_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{CHATML_START}assistant\\n' }}}}{{% endif %}}"
)

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# A template is somebody's program: besides what jinja raises, it divides, indexes and asks for attributes.
_TEMPLATE_FAILS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)

MARK = "\ue000"
"""Stands for words in conversations that are rendered to see what a template does; of Unicode's private use area."""


def prepare_tokenizer(
    path: str | Path, chat_template: str | None = None, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model directory or hub id, with the chat template and EOS token of the config.

    `chat_template` is the jinja text itself or the path of a file that holds it. `eos_token` must be in the
    vocabulary. Both travel with the tokenizer into the export.
    """
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _VOCABULARIES):
        # transformers makes an empty tokenizer then, to which every text is nothing
        advice = "copy the tokenizer's files into the folder"
        raise need("model_name_or_path", "a model with a tokenizer", f"{path} without one", advice)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        what = (str(error).strip().splitlines() or ["it cannot be read"])[0]
        raise need("model_name_or_path", "a model with a tokenizer", str(path), what) from error
    if not tokenizer.is_fast:  # masks are decided by character offsets, which only these know
        raise need("model_name_or_path", "a model with tokenizer.json", str(path), "save its tokenizer in that form")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        _check_syntax(tokenizer)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise need("eos_token", "a token of the vocabulary", repr(eos_token), "check its spelling")
        # Registered as special, so that its text becomes this one token wherever it stands.
        tokenizer.add_special_tokens({"eos_token": eos_token})
    return tokenizer


def _read_template(chat_template: str) -> str:
    """The jinja text; a value without any brace cannot be a template and is taken for a file name."""
    if "{" in chat_template:
        return chat_template
    if not Path(chat_template).is_file():
        raise need("chat_template", "jinja text or an existing file", repr(chat_template), "check the path")
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise need("chat_template", "a file in UTF-8", repr(chat_template), str(error)) from error


def _check_syntax(tokenizer: PreTrainedTokenizerBase) -> None:
    """Compile the template before any row meets it; what it says to a conversation of one word is of no interest."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise need("chat_template", "valid jinja", f"line {error.lineno}", f"{error.message}") from error
    except _TEMPLATE_FAILS:
        pass  # a template may refuse a single user message


def with_chatml(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that writes conversations as ChatML, `<|im_start|>` being BOS and `<|im_end|>` EOS and padding.

    As open-r1 does for a tokenizer without a template. A token that is not there yet gets the next free id.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": CHATML_START, "eos_token": CHATML_END, "pad_token": CHATML_END})
    tokenizer.chat_template = CHATML
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, row_format: RowFormat) -> str | None:
    """The EOS token, which ends what is trained on, for rows of this format; None where they are tokens already.

    Raises UserError if there is none, if the tokenizer does not read its text as that token, or if it is not what the
    chat template ends the assistant's turns with.
    """
    eos = tokenizer.eos_token
    if row_format.kind == "tokens":
        return None
    if row_format.conversational:
        ending = end_of_turn(tokenizer)
        if ending != eos:
            rule = f"{ending}, with which the chat template ends the assistant's turns"
            raise need("eos_token", rule, "null" if eos is None else str(eos), f"set eos_token: {ending}")
        return ending
    if not isinstance(eos, str):
        advice = "the tokenizer has none of its own: name a token of its vocabulary"
        raise need("eos_token", "a token that ends a text", "null", advice)
    if tokenizer(eos, add_special_tokens=False)["input_ids"] != [tokenizer.eos_token_id]:
        advice = "set eos_token, which makes it one"
        raise need("eos_token", "a text that the tokenizer reads as one token", repr(eos), advice)
    return eos


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the chat template writes after the assistant's words; raises UserError if it has none."""
    if not tokenizer.chat_template:
        advice = "the tokenizer has none of its own: set the key to jinja text or to a file"
        raise need("chat_template", "a template for conversations", "null", advice)
    advice = "use a template that ends each turn with a special token of the vocabulary"
    try:
        text = apply_template(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}])
    except RowError as error:
        raise need("chat_template", "a template for a question and its answer", str(error), advice) from error
    if MARK not in text:
        raise need("chat_template", "the assistant's words in what it writes", "a text without them", advice)
    closing = text.rpartition(MARK)[2]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    if tokenizer.unk_token != tokenizer.eos_token:
        special.discard(tokenizer.convert_tokens_to_ids(str(tokenizer.unk_token)))  # ordinary text may become it
    for token in tokenizer(closing, add_special_tokens=False)["input_ids"]:
        if token in special:
            return str(tokenizer.convert_ids_to_tokens(token))
    raise need("chat_template", "a special token after the assistant's words", repr(closing), advice)


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    tools: list[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """The conversation as the chat template writes it with these tools and variables; raises RowError if it refuses."""
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(variables or {}),
        )
    except _TEMPLATE_FAILS as error:
        raise RowError(f"the chat template refuses it: {error}") from error
    return str(text)
