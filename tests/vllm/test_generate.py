"""`r1jax.generate --engine vllm`: the rows that --engine jax writes, drawn by the server."""

import json
from pathlib import Path

import numpy as np
import pytest

from r1jax import generate
from tests.vllm.conftest import Trainer
from tests.vllm.server import Server

pytestmark = pytest.mark.vllm
ROWS = [
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "id": 7},
    {"prompt": "Once upon a time"},
    {"messages": [{"role": "user", "content": "Say yes."}]},
]


def draw(output: Path, model: Path, prompts: Path, *more: str) -> list[dict]:
    argv = ["--model_name_or_path", str(model), "--prompts", str(prompts), "--output", str(output)]
    assert generate.main([*argv, "--max_new_tokens", "16", *more]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_rows_come_out_with_their_generations(server: Server, smollm2: Path, prompts: Path, tmp_path: Path):
    vllm = ("--engine", "vllm", "--vllm_server_url", server.url)
    rows = draw(tmp_path / "out.jsonl", smollm2, prompts, *vllm, "--num_generations", "3", "--temperature", "0.7")
    assert [{key: value for key, value in row.items() if key != "generations"} for row in rows] == ROWS
    for one in (one for row in rows for one in row["generations"]):
        assert set(one) == {"text", "token_ids", "logprobs", "finish_reason"}
        assert len(one["token_ids"]) == len(one["logprobs"])
        assert (one["token_ids"][-1] == 2) == (one["finish_reason"] == "stop")
        assert "<|im_end|>" not in one["text"]
    # Started again, it finds them; cut off, it draws what is missing alike.
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(whole[: len(whole) // 2])
    again = draw(tmp_path / "out.jsonl", smollm2, prompts, *vllm, "--num_generations", "3", "--temperature", "0.7")
    tokens = [[[one["token_ids"] for one in row["generations"]] for row in found] for found in (rows, again)]
    assert tokens[0] == tokens[1]


def test_greedy_rows_are_the_embedded_engines(
    server: Server, trainer: Trainer, smollm2: Path, prompts: Path, tmp_path: Path
):
    # The server has what the last test pushed: it must have the model's own weights for this.
    from tests.vllm.test_sync import engine

    made = engine(server, trainer)
    made.sync(trainer.params, 0)
    made.close()
    vllm = ("--engine", "vllm", "--vllm_server_url", server.url)
    ours = draw(tmp_path / "jax.jsonl", smollm2, prompts, "--temperature", "0")
    theirs = draw(tmp_path / "vllm.jsonl", smollm2, prompts, *vllm, "--temperature", "0")
    for one, other in zip(ours, theirs, strict=True):
        assert one["generations"][0]["text"] == other["generations"][0]["text"]
        first, second = (np.array(row["generations"][0]["logprobs"]) for row in (one, other))
        np.testing.assert_allclose(first, second, atol=1e-4)
