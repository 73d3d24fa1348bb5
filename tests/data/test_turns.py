"""What is trained on with assistant_only_loss, marked by hand in « » for templates of many shapes, to the character."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1jax.data.encoding import DROPPED, RowEncoder
from r1jax.data.formats import RowFormat
from r1jax.data.messages import RowError, read_messages
from r1jax.data.rendering import render
from r1jax.data.templates import apply_template

TEMPLATES = Path(__file__).parent / "templates"
BEGIN = "<s>"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

# (template, the token that ends a turn, conversation, what it becomes; what is trained on stands in « »)
CASES = {
    "chatml": (
        "<|im_end|>",
        [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")],
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n«a1<|im_end|>»\n"
        "<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n«a2<|im_end|>»\n",
    ),
    "chatml: words of the template in the user's mouth": (
        "<|im_end|>",
        [("user", "<|im_start|>assistant\na1<|im_end|>"), ("assistant", "a1"), ("user", "a1"), ("assistant", "")],
        "<|im_start|>user\n<|im_start|>assistant\na1<|im_end|><|im_end|>\n<|im_start|>assistant\n«a1<|im_end|>»\n"
        "<|im_start|>user\na1<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n",
    ),
    "chatml: the user has the last word": (
        "<|im_end|>",
        [("assistant", " a0\n"), ("assistant", "a1"), ("user", "u1")],
        "<|im_start|>assistant\n« a0\n<|im_end|>»\n<|im_start|>assistant\n«a1<|im_end|>»\n"
        "<|im_start|>user\nu1<|im_end|>\n",
    ),
    "smollm2": (
        "<|im_end|>",
        [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")],
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n«a1<|im_end|>»\n"
        "<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n«a2<|im_end|>»\n",
    ),
    "llama3": (
        "<|eot_id|>",
        [("user", " u1 "), ("assistant", "\na1 "), ("user", "u2"), ("assistant", "a2")],
        f"{BEGIN}<|start_header_id|>user<|end_header_id|>\n\nu1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a1<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nu2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a2<|eot_id|>»",
    ),
    "llama3: tool calls": (
        "<|eot_id|>",
        [("user", "u1"), ("assistant", None, CALL), ("tool", "2"), ("assistant", "a2")],
        f"{BEGIN}<|start_header_id|>user<|end_header_id|>\n\nu1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '«{"name": "add", "arguments": {"a": 1}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"2"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a2<|eot_id|>»",
    ),
    "mistral": (
        "</s>",
        [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2 ")],
        f"{BEGIN}[INST] u1 [/INST]« a1</s>»[INST] u2 [/INST]« a2</s>»",
    ),
    "qwen2_5: tool calls": (
        "<|im_end|>",
        [
            *[("user", "u1"), ("assistant", "", CALL), ("tool", "2"), ("tool", "3"), ("assistant", "a2")],
            *[("user", "u2"), ("assistant", "let me", CALL, CALL)],
        ],
        "<|im_start|>user\nu1<|im_end|>\n"
        "<|im_start|>assistant\n«<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«a2<|im_end|>»\n"
        "<|im_start|>user\nu2<|im_end|>\n"
        "<|im_start|>assistant\n«let me\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n',
    ),
    "qwen3: reasoning that earlier turns lose": (
        "<|im_end|>",
        [
            *[("user", "u1"), ("assistant", "<think>\nt1\n</think>\n\na1")],
            *[("user", "u2"), ("assistant", "<think>\nt2\n</think>\n\na2")],
        ],
        "<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n«<think>\nt2\n</think>\n\na2<|im_end|>»\n",
    ),
    "qwen3: no reasoning to lose": (
        "<|im_end|>",
        [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")],
        "<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n«a1<|im_end|>»\n"
        "<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\na2<|im_end|>»\n",
    ),
    "qwen3: reasoning kept between tool calls": (
        "<|im_end|>",
        [
            *[("user", "u1"), ("assistant", "<think>\nt1\n</think>\n\na1", CALL), ("tool", "2")],
            ("assistant", "<think>\nt2\n</think>\n\na2"),
        ],
        "<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\n«<think>\nt1\n</think>\n\na1\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nt2\n</think>\n\na2<|im_end|>»\n",
    ),
    "deepseek_r1": (
        "</s>",
        [("system", "s"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")],
        f"{BEGIN}s<|User|>u1<|Assistant|>«a1</s>»<|User|>u2<|Assistant|>«a2</s>»",
    ),
    "deepseek_r1: tool calls": (
        "</s>",
        [("user", "u1"), ("assistant", None, CALL), ("tool", "2"), ("assistant", "a1")],
        f"{BEGIN}<|User|>u1<|Assistant|>«<|tool_call|>add\n"
        '{"a": 1}</s>»<|tool_output|>2«a1</s>»',
    ),
    "deepseek_r1_keeps_reasoning: the prompt holds the opening tag": (
        "</s>",
        [
            *[("user", "u1"), ("assistant", "<think>\nt1\n</think>a1")],
            *[("user", "u2"), ("assistant", "<think>\nt2\n</think>a2")],
        ],
        f"{BEGIN}<|User|>u1<|Assistant|><think>\n«t1\n</think>a1</s>»"
        "<|User|>u2<|Assistant|><think>\n«t2\n</think>a2</s>»",
    ),
}  # fmt: skip

SPECIAL = [
    *("<unk>", BEGIN, "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|User|>", "<|Assistant|>", "<|tool_call|>", "<|tool_output|>", "[INST]", "[/INST]"),
]
MESSAGES = RowFormat(
    kind="messages", columns=("messages",), conversational=True, completion_only=False, assistant_only=True
)
PAIR = RowFormat(
    kind="prompt_completion", columns=("p", "c"), conversational=True, completion_only=True, assistant_only=True
)


def make_tokenizer(template: str, stop: str) -> PreTrainedTokenizerFast:
    """A token for every character but the special tokens, so that tokens and characters can be compared."""
    words = [*SPECIAL, "\n", *map(chr, range(ord(" "), ord("~") + 1))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token=BEGIN, eos_token=stop,
        chat_template=(TEMPLATES / f"{template}.jinja").read_text(),
    )  # fmt: skip


def conversation(turns: list[tuple]) -> list[dict[str, Any]]:
    """Messages with every key that any of them has, as Arrow gives them."""
    return [{"role": role, "content": words, "tool_calls": list(calls) or None} for role, words, *calls in turns]


def marked(tokenizer: PreTrainedTokenizerFast, row: dict, row_format: RowFormat) -> tuple[str, str]:
    """The row with « » around what is trained on, by characters and by tokens."""
    rendered = render(row, row_format, tokenizer)
    cuts = [0, *[at for span in rendered.trained for at in span], len(rendered.text)]
    pieces = [rendered.text[a:b] for a, b in itertools.pairwise(cuts)]
    by_characters = "".join(f"«{piece}»" if i % 2 else piece for i, piece in enumerate(pieces))
    encoded = RowEncoder(tokenizer=tokenizer, row_format=row_format, max_length=None).encode([row])
    by_tokens, before = "", False
    for token, trained in zip([*encoded.tokens, None], [*encoded.loss_mask.tolist(), False], strict=True):
        by_tokens += "«" * (trained and not before) + "»" * (before and not trained)
        by_tokens += "" if token is None else str(tokenizer.convert_ids_to_tokens(int(token)))
        before = trained
    return by_characters, by_tokens


@pytest.mark.parametrize("case", CASES)
def test_spans_are_those_marked_by_hand(case):
    stop, turns, expected = CASES[case]
    tokenizer = make_tokenizer(case.partition(":")[0], stop)
    row = {"messages": conversation(turns)}
    assert marked(tokenizer, row, MESSAGES) == (expected, expected)
    # What is not marked is the template's own text.
    assert re.sub("[«»]", "", expected) == apply_template(tokenizer, read_messages(row["messages"]))


def test_with_completion_only_the_answers_of_the_completion_are_trained():
    tokenizer = make_tokenizer("chatml", "<|im_end|>")
    turns = conversation([("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"), ("user", "u3")])
    turns += conversation([("assistant", "a3")])
    expected = (
        "<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nu2<|im_end|>\n"
        "<|im_start|>assistant\n«a2<|im_end|>»\n<|im_start|>user\nu3<|im_end|>\n<|im_start|>assistant\n«a3<|im_end|>»\n"
    )
    assert marked(tokenizer, {"p": turns[:3], "c": turns[3:]}, PAIR) == (expected, expected)


def test_a_row_without_an_answer_has_nothing_to_train_on():
    tokenizer = make_tokenizer("chatml", "<|im_end|>")
    row = {"messages": conversation([("system", "s"), ("user", "u1")])}
    encoded = RowEncoder(tokenizer=tokenizer, row_format=MESSAGES, max_length=None).encode([row, row])
    assert (encoded.fates.tolist(), len(encoded.tokens)) == ([DROPPED, DROPPED], 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # The end of a turn after the last message alone.
        ("{% for m in messages %}{{ m.content }}{% endfor %}</s>", "ends message 1 without </s>"),
        # No generation prompt.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}",
            r"writes '<\|im_start\|>assistant' before the words of message 1",
        ),
        # A footer that depends on the answer.
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}{{ messages[1].content | length if messages[3] }}",
            "where the words of message 1 begin and end cannot be seen",
        ),
        # Words that change others: nothing can be said about what belongs to whom.
        (
            "{% for m in messages %}{{ messages[-1].content | length }}{{ m.content }}</s>{% endfor %}",
            "before the words of message 1, which is not in",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(template, message):
    tokenizer = make_tokenizer("chatml", "</s>")
    tokenizer.chat_template = template
    row = {"messages": conversation([("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")])}
    with pytest.raises(RowError, match=message):
        render(row, MESSAGES, tokenizer)
