import numpy as np
import pytest

from r1jax.data.encoding import DROPPED, TRUNCATED, UNALIGNED, RowEncoder, trained_tokens
from r1jax.data.formats import RowFormat

MESSAGES = RowFormat(kind="messages", columns=("messages",), conversational=True, completion_only=False)
TEXT = RowFormat(kind="text", columns=("text",), conversational=False, completion_only=False)
PAIR = RowFormat(kind="prompt_completion", columns=("p", "c"), conversational=False, completion_only=True)
CHAT_PAIR = RowFormat(kind="prompt_completion", columns=("p", "c"), conversational=True, completion_only=True)


def marked(encoder: RowEncoder, row: dict) -> str:
    """The row's tokens, those that are trained on in brackets."""
    encoded = encoder.encode([row])
    words = [str(encoder.tokenizer.decode([token])) for token in encoded.tokens]
    return "".join(f"[{w}]" if m else w for w, m in zip(words, encoded.loss_mask, strict=True))


def encoder(tokenizer, row_format: RowFormat, max_length: int | None = None) -> RowEncoder:
    return RowEncoder(tokenizer=tokenizer, row_format=row_format, max_length=max_length)


def test_messages_train_on_all_but_the_first_token(tokenizer):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes no"}]}
    assert marked(encoder(tokenizer, MESSAGES), row) == (
        "<|im_start|>[user][\n][hi][<|im_end|>][\n][<|im_start|>][assistant][\n][yes][ no][<|im_end|>][\n]"
    )


def test_conversational_pair_trains_on_the_answer_and_its_stop_token(tokenizer):
    row = {
        "p": [{"role": "system", "content": "a"}, {"role": "user", "content": "hi you?"}],
        "c": [{"role": "assistant", "content": "yes"}],
    }
    assert marked(encoder(tokenizer, CHAT_PAIR), row) == (
        "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nhi you?<|im_end|>\n<|im_start|>assistant\n"
        "[yes][<|im_end|>][\n]"
    )


def test_plain_rows(tokenizer):
    assert marked(encoder(tokenizer, PAIR), {"p": "a b?", "c": "yes no"}) == "a b?[yes][ no][<|im_end|>]"
    assert marked(encoder(tokenizer, PAIR), {"p": "", "c": "yes no"}) == "yes[ no][<|im_end|>]"
    assert marked(encoder(tokenizer, TEXT), {"text": "a b"}) == "a[ b][<|im_end|>]"


def test_token_across_the_boundary_is_trained_on_and_counted(tokenizer):
    row = {"p": "a:1", "c": "2?"}
    assert marked(encoder(tokenizer, PAIR), row) == "a:[12][?][<|im_end|>]"
    assert encoder(tokenizer, PAIR).encode([row, {"p": "a:", "c": "12"}]).fates.tolist() == [UNALIGNED, 0]


def test_trimmed_offsets_and_an_added_bos(byte_tokenizer):
    """A run of spaces has an empty range of characters, at its end; a space before a word is cut off; BOS is at 0."""
    ranges = byte_tokenizer("the   cat", return_offsets_mapping=True)["offset_mapping"]
    assert ranges == [(0, 0), (0, 3), (5, 5), (6, 9)]
    assert marked(encoder(byte_tokenizer, PAIR), {"p": "the  ", "c": " cat"}) == "<s>the  [ cat][</s>]"
    assert marked(encoder(byte_tokenizer, PAIR), {"p": "the", "c": "   cat"}) == "<s>the[  ][ cat][</s>]"
    assert marked(encoder(byte_tokenizer, TEXT), {"text": "the   cat"}) == "<s>[the][  ][ cat][</s>]"


def test_characters_of_several_tokens(byte_tokenizer):
    """Each byte of an accented letter is a token with the letter's range."""
    encoded = encoder(byte_tokenizer, PAIR).encode([{"p": "é", "c": "é"}])
    assert encoded.loss_mask.tolist() == [False, False, False, True, True, True]


def test_ranges_by_last_character():
    ends = np.asarray([1, 2, 5, 6, 6, 9])
    assert trained_tokens(ends, [(2, 5), (6, 9)]).tolist() == [False, False, True, False, False, True]
    assert trained_tokens(ends, [(0, 9)]).tolist() == [False, True, True, True, True, True]


def test_cut_to_max_length_keeps_the_start_and_drops_rows_left_without_target(tokenizer):
    rows = [{"p": "a b?", "c": "yes no"}, {"p": "a", "c": "?"}, {"p": "a b c? hi you", "c": "?"}]
    encoded = encoder(tokenizer, PAIR, 4).encode(rows)
    assert encoded.lengths.tolist() == [4, 3]
    assert encoded.loss_mask.tolist() == [False, False, False, True, False, True, True]
    assert encoded.fates.tolist() == [TRUNCATED, 0, TRUNCATED | DROPPED]
    assert encoded.tokens.dtype == np.int32
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.tokens)) == "a b?yesa?<|im_end|>"


# Writes the end of a turn after every message but the last, as no template should.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}"
    "{{ '<|im_end|>\n' if not loop.last or messages | length == 2 }}{% endfor %}"
)


def chat(*words: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]}


def test_a_whole_row_without_its_stop_token_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    rows = [chat("hi", "yes"), chat("hi", "yes", "a", " no"), chat("hi", "yes", "a")]
    assert encoder(tokenizer, MESSAGES).encode(rows[:1]).lengths.tolist() == [10]
    message = r"^dataset_name: need rows that train their stop token <\|im_end\|>, got row 6 without; "
    with pytest.raises(ValueError, match=message):
        encoder(tokenizer, MESSAGES).encode(rows, first_index=5)
    # Cut rows have lost theirs anyway; a user's last word needs none, as an earlier answer has been ended.
    assert encoder(tokenizer, MESSAGES, max_length=4).encode(rows).fates.tolist() == [TRUNCATED] * 3
    assert encoder(tokenizer, MESSAGES).encode([rows[2]]).lengths.tolist() == [13]


def test_a_row_with_no_end_at_all_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match="got row 0 without"):
        encoder(tokenizer, MESSAGES).encode([chat("hi")])


def test_errors_name_the_row(tokenizer):
    with pytest.raises(
        ValueError, match=r"^dataset_name: need text that can be written out, got row 12; need a string"
    ):
        encoder(tokenizer, TEXT).encode([{"text": "a"}, {"text": "b"}, {"text": None}], first_index=10)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^chat_template: "):
        encoder(tokenizer, MESSAGES)
