import datasets
import pytest

from r1jax.config.data import DataConfig
from r1jax.config.errors import UserError
from r1jax.config.objective import ObjectiveConfig
from r1jax.data.encoding import RowEncoder
from r1jax.data.formats import detect_format
from r1jax.data.tokenized import tokenise

IDS = [5, 6, 7, 8]


def encode(tokenizer, row: dict, max_length: int | None = None, **masks) -> tuple[list[int], list[int]]:
    """The tokens that the row becomes and which of them are trained on, through all that reads a dataset."""
    rows = datasets.Dataset.from_list([{"text": "not read", **row}])
    row_format = detect_format(rows, DataConfig(dataset_name="x"), ObjectiveConfig(**masks))
    encoder = RowEncoder(tokenizer=tokenizer, row_format=row_format, max_length=max_length)
    result = tokenise(rows, encoder, show_progress=False)
    return result.tokens.tolist(), result.loss_mask.astype(int).tolist()


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({}, [0, 1, 1, 1]),
        ({"labels": [-100, -100, 7, 8]}, [0, 0, 1, 1]),
        ({"labels": IDS}, [0, 1, 1, 1]),
        ({"completion_mask": [0, 1, 1, 0]}, [0, 1, 1, 0]),
        ({"assistant_masks": [1, 0, 0, 1]}, [0, 0, 0, 1]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}, [0, 0, 1, 0]),
        ({"completion_mask": [True, False, True, True], "labels": [5, 6, 7, -100]}, [0, 0, 1, 0]),
    ],
)
def test_masks_are_taken_as_they_come(tokenizer, row, trained):
    assert encode(tokenizer, {"input_ids": IDS, **row}) == (IDS, trained)


def test_a_refused_mask_is_not_read_and_the_end_is_cut(tokenizer):
    row = {"input_ids": IDS, "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 1]}
    assert encode(tokenizer, row, completion_only_loss=False) == (IDS, [0, 1, 1, 1])
    assert encode(tokenizer, row, max_length=3) == (IDS[:3], [0, 0, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": None}, "need a list of whole numbers in input_ids, got nothing"),
        ({"input_ids": [5, 99]}, "need token ids below 23, got 99 in input_ids"),
        ({"input_ids": [5, -1]}, "need token ids below 23, got -1 in input_ids"),
        ({"input_ids": ["a"]}, "need a list of whole numbers in input_ids, got something else"),
        ({"input_ids": IDS, "labels": [6, 7, 8, -100]}, "need labels equal to input_ids or -100, got 6 at 0"),
        ({"input_ids": IDS, "labels": [5]}, "need one entry of labels a token, got 1 for 4 tokens"),
        ({"input_ids": IDS, "completion_mask": [0, 2, 1, 1]}, "need 0 or 1 in completion_mask"),
        ({"input_ids": IDS, "assistant_masks": None}, "need a list of whole numbers in assistant_masks, got nothing"),
    ],
)
def test_malformed_rows(tokenizer, row, message):
    with pytest.raises(UserError, match=rf"^dataset_name: need input_ids that can be read, got row 0; {message}"):
        encode(tokenizer, row)


@pytest.mark.parametrize(
    ("key", "columns"),
    [("completion_only_loss", "labels or completion_mask"), ("assistant_only_loss", "labels or assistant_masks")],
)
def test_a_mask_that_is_asked_for_must_be_there(tokenizer, key, columns):
    with pytest.raises(UserError, match=rf"^{key}: need {columns} beside input_ids, got the columns text, input_ids; "):
        encode(tokenizer, {"input_ids": IDS}, **{key: True})
    assert encode(tokenizer, {"input_ids": IDS, "labels": IDS}, **{key: True})[1] == [0, 1, 1, 1]
