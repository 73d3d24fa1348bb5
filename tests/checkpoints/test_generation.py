"""generation_config keeps the source's settings and ends completions where the tokenizer ends turns."""

import types

from r1jax.checkpoints.generation import generation_config, read_generation_config, stop_ids

TOKENIZER = types.SimpleNamespace(bos_token_id=None, eos_token_id=7, pad_token_id=3)


def test_stop_ids_are_the_union_in_order():
    assert stop_ids(5, [7, 5], None, 9) == [5, 7, 9]


def test_tokenizers_eos_joins_the_sources():
    source = {"eos_token_id": 2, "temperature": 0.7, "pad_token_id": 0}
    assert generation_config(source, {}, TOKENIZER) == source | {"eos_token_id": [2, 7]}
    assert generation_config({"eos_token_id": [2, 7]}, {}, TOKENIZER)["eos_token_id"] == [2, 7]


def test_one_id_stays_an_int():
    assert generation_config({"eos_token_id": [7]}, {}, TOKENIZER)["eos_token_id"] == 7


def test_without_a_source_config_json_and_tokenizer_count():
    result = generation_config({}, {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16}, TOKENIZER)
    assert result == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 3}


def test_config_jsons_eos_counts_beside_the_sources():
    assert generation_config({"eos_token_id": 2}, {"eos_token_id": [4, 7]}, TOKENIZER)["eos_token_id"] == [2, 4, 7]
    assert generation_config({"top_p": 0.8}, {"eos_token_id": 4}, None) == {"top_p": 0.8, "eos_token_id": 4}


def test_an_absent_file_is_an_empty_config(tmp_path):
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.8}')
    assert read_generation_config(tmp_path) == {"top_p": 0.8}
