import json
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1jax import generate
from r1jax.checkpoints.hf_export import export
from r1jax.models.families import decoder_config
from r1jax.models.parameters import init_params

HF_CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
    "hidden_act": "silu",
    "rope_theta": 1e4,
    "torch_dtype": "float32",
}
TEMPLATE = "{% for m in messages %}{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
ROWS = [
    {"prompt": "hello", "id": 1},
    {"messages": [{"role": "user", "content": "what is it"}]},
    {"prompt": "a longer one of many words"},
    {"prompt": "ü z", "note": "ünïcode"},
    {"prompt": "last"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model whose tokens are characters; `<end>` is its eos and `.` another stop token."""
    path = tmp_path_factory.mktemp("model")
    characters = ["<end>", "?", *"abcdefghijklmnopqrstuvwxyz .,!0123"]
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate(characters)}, "?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", chat_template=TEMPLATE)
    config = decoder_config(HF_CONFIG)
    export(
        path,
        init_params(config, jax.random.key(0)),
        config=config,
        hf_config=HF_CONFIG,
        tokenizer=tokenizer,
        generation_config={"eos_token_id": characters.index(".")},
    )
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def arguments(model, prompts, output, **changes):
    values = {"num_generations": 2, "max_new_tokens": 10, "batch_size": 4, **changes}
    argv = ["--model_name_or_path", str(model), "--prompts", str(prompts), "--output", str(output)]
    return argv + [part for key, value in values.items() for part in (f"--{key}", str(value))]


def draw(model, prompts, output, **changes):
    assert generate.main(arguments(model, prompts, output, **changes)) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_the_same_rows_come_out_with_their_generations(model, prompts, tmp_path):
    rows = draw(model, prompts, tmp_path / "out.jsonl", num_generations=8)
    assert [{key: value for key, value in row.items() if key != "generations"} for row in rows] == ROWS
    found = [one for row in rows for one in row["generations"]]
    assert {len(row["generations"]) for row in rows} == {8}
    assert {one["finish_reason"] for one in found} == {"stop", "length"}
    # Both stop tokens end a text, as the model's and as the tokenizer's.
    assert {one["token_ids"][-1] for one in found if one["finish_reason"] == "stop"} == {0, 29}
    for one in found:
        assert len(one["token_ids"]) == len(one["logprobs"])
        assert all(logprob <= 0 for logprob in one["logprobs"])
        # One token a character; the stop token is not part of the text, and ids without a token are nothing.
        named = [token for token in one["token_ids"] if token < 36]
        assert len(one["text"]) == len(named) - (one["finish_reason"] == "stop")


def test_greedy_rows_are_those_of_transformers(model, prompts, tmp_path):
    import torch
    import transformers

    rows = draw(model, prompts, tmp_path / "out.jsonl", num_generations=1, temperature=0)
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for row in rows:
        text = row["prompt"] if "prompt" in row else row["messages"][0]["content"] + "<end>a"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = reference.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=[0, 29], pad_token_id=0)
        assert row["generations"][0]["token_ids"] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(model, prompts, tmp_path, share):
    draw(model, prompts, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    output = tmp_path / "cut.jsonl"
    output.write_bytes(whole[: int(share * len(whole))])
    draw(model, prompts, output)
    assert without_rounding(output) == without_rounding(tmp_path / "whole.jsonl")


def without_rounding(path):
    """The rows with rounded log-probabilities: the batch that a row is in decides their last bits."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        for one in row["generations"]:
            one["logprobs"] = [round(logprob, 4) for logprob in one["logprobs"]]
    return rows


def test_a_finished_file_is_left_as_it_is(model, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    draw(model, prompts, output)
    before = (output.read_bytes(), output.stat().st_mtime_ns)
    draw(model, prompts, output)
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before


def test_batch_size_changes_no_sample_and_seed_does(model, prompts, tmp_path):
    first, second = (draw(model, prompts, tmp_path / str(size), batch_size=size) for size in (1, 16))
    tokens = [[[one["token_ids"] for one in row["generations"]] for row in rows] for rows in (first, second)]
    assert tokens[0] == tokens[1]
    other = draw(model, prompts, tmp_path / "other", seed=1)
    assert [[one["token_ids"] for one in row["generations"]] for row in other] != tokens[0]


def test_the_sampling_options_change_samples_and_are_kept_for_resuming(model, prompts, tmp_path, capsys):
    plain = draw(model, prompts, tmp_path / "plain")
    off = draw(model, prompts, tmp_path / "off", top_k=0, min_p=0, repetition_penalty=1)
    assert off == plain
    # One token is left to draw, so these are greedy whatever the seed.
    greedy = draw(model, prompts, tmp_path / "greedy", num_generations=1, temperature=0)
    for name, changes in {"k": {"top_k": 1}, "p": {"min_p": 1}}.items():
        found = draw(model, prompts, tmp_path / name, num_generations=1, seed=5, **changes)
        assert tokens_of(found) == tokens_of(greedy)
        assert {logprob for row in found for one in row["generations"] for logprob in one["logprobs"]} == {0.0}
    penalised = draw(model, prompts, tmp_path / "penalised", num_generations=1, temperature=0, repetition_penalty=1e6)
    assert all(len(set(one["token_ids"])) == len(one["token_ids"]) for row in penalised for one in row["generations"])
    capsys.readouterr()
    assert generate.main(arguments(model, prompts, tmp_path / "plain", top_k=3)) == 2
    assert_one_line(capsys, "top_k: need 0, with which")


def tokens_of(rows):
    return [[one["token_ids"] for one in row["generations"]] for row in rows]


def test_bfloat16_runs_and_is_near(model, prompts, tmp_path):
    exact = draw(model, prompts, tmp_path / "exact", num_generations=1, temperature=0, max_new_tokens=1)
    near = draw(model, prompts, tmp_path / "near", num_generations=1, temperature=0, max_new_tokens=1, dtype="bfloat16")
    for a, b in zip(exact, near, strict=True):
        assert a["generations"][0]["logprobs"] != b["generations"][0]["logprobs"]
        np.testing.assert_allclose(a["generations"][0]["logprobs"], b["generations"][0]["logprobs"], atol=0.2)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"temperature": -1}, "temperature: need x >= 0, got -1;"),
        ({"top_p": 0}, "top_p: need 0 < x <= 1, got 0;"),
        ({"top_p": 1.5}, "top_p: need 0 < x <= 1, got 1.5;"),
        ({"top_k": -2}, "top_k: need x >= 0, got -2;"),
        ({"min_p": 2}, "min_p: need 0 <= x <= 1, got 2;"),
        ({"repetition_penalty": 0}, "repetition_penalty: need x > 0, got 0;"),
        ({"num_generations": 0}, "num_generations: need x >= 1, got 0;"),
        ({"max_new_tokens": 0}, "max_new_tokens: need x >= 1, got 0;"),
        ({"max_new_tokens": 60}, "max_new_tokens: need prompt + max_new_tokens within the model's 64 positions"),
        ({"seed": -1}, "seed: need 0 <= x < 2**32, got -1;"),
        ({"dtype": "float16"}, "dtype: need one of float32, bfloat16"),
        ({"temperature": "hot"}, "temperature: need a value of type float"),
        ({"engine": "vllm"}, "vllm_server_url: need at least one address, got none;"),
        ({"engine": "vllm", "vllm_server_url": "x:1"}, "vllm_server_url: need http://host:port"),
        ({"engine": "vllm", "vllm_server_url": "http://x"}, "R1JAX_VLLM_KEY: need a key in the environment or in"),
        ({"vllm_server_url": "http://x"}, "engine: need vllm with --vllm_server_url, got jax;"),
        ({"engine": "x"}, "engine: need one of jax, vllm, got 'x';"),
        ({"prompts": "none.jsonl"}, "prompts: need a JSON lines file, got none.jsonl, which does not exist;"),
        ({"model_name_or_path": "./none"}, "model_name_or_path: need a directory that exists or a hub id"),
        ({"num_generation": 1}, "num_generation: need a known option"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(model, prompts, tmp_path, capsys, monkeypatch, changes, line):
    monkeypatch.delenv("R1JAX_VLLM_KEY", raising=False)
    monkeypatch.setenv("R1JAX_VLLM_KEY_FILE", str(tmp_path / "none"))
    output = tmp_path / "new" / "out.jsonl"
    # The last of two equal options counts.
    argv = arguments(model, prompts, output) + [
        part for key, value in changes.items() for part in (f"--{key}", str(value))
    ]
    assert generate.main(argv) == 2
    assert_one_line(capsys, line)
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"prompt": "x"}\nnonsense\n', "prompts: need JSON on every line, got something else at line 2;"),
        ('{"question": "x"}\n', "prompts: need `prompt` (text) or `messages`"),
        ('{"prompt": "x"}\n{"prompt": ""}\n', "prompts: need at least one token in each, got none in line 2;"),
    ],
)
def test_bad_prompts_are_one_line_and_nothing_is_written(model, tmp_path, capsys, text, line):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(text)
    assert generate.main(arguments(model, prompts, tmp_path / "out.jsonl")) == 2
    assert_one_line(capsys, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_the_prompts_are_never_overwritten(model, prompts, capsys):
    before = prompts.read_bytes()
    assert generate.main(arguments(model, prompts, prompts)) == 2
    assert_one_line(capsys, "output: need another file than --prompts")
    assert prompts.read_bytes() == before


def assert_one_line(capsys, beginning):
    error = capsys.readouterr().err
    assert error.startswith(beginning)
    assert error.count("\n") == 1
