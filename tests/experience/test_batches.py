import json

import numpy as np
import pytest

from r1jax.experience.batches import build_step, lay_out_step, make_geometry
from tests.experience.conftest import make_rollout


def test_one_shape_for_every_step_of_a_run():
    geometry = make_geometry(longest=300, shortest=20, num_sequences=128, per_device=16, shards=2)
    assert geometry.row_length == 1024 and geometry.rows_per_micro_batch % 2 == 0
    for lengths in ([300] * 128, [21] * 128, list(range(21, 149))):
        layout = lay_out_step(lengths, geometry)
        assert len(layout.rows) <= geometry.max_micro_batches * geometry.rows_per_micro_batch
        assert sorted(number for row in layout.rows for number in row) == list(range(128))
        assert all(sum(lengths[number] for number in row) <= geometry.row_length for row in layout.rows)
        assert all(len(row) <= geometry.max_segments for row in layout.rows)


@pytest.mark.parametrize(("longest", "row_length"), [(20, 128), (85, 512), (600, 1024), (2560, 2560)])
def test_rows_hold_several_short_completions(longest, row_length):
    assert make_geometry(longest=longest, shortest=5, num_sequences=64, per_device=8, shards=1).row_length == row_length


def test_a_micro_batch_fits_where_the_longest_completions_fit():
    """8 completions of 2560 tokens a device are what the user allows: 8 rows of that length, however many devices."""
    geometry = make_geometry(longest=2560, shortest=20, num_sequences=16384, per_device=8, shards=4)
    assert geometry.rows_per_shard == 8 and geometry.rows_per_micro_batch == 32


def gsm8k_like(assets, count: int, seed: int) -> list[int]:
    """Lengths of prompts with completions of up to 256 tokens, in groups of 8, made from those of real problems."""
    rows = [json.loads(line) for line in (assets / "data" / "gsm8k_train.jsonl").read_text().splitlines()[:2000]]
    rng = np.random.default_rng(seed)
    lengths = []
    for at in rng.integers(0, len(rows), count // 8):
        prompt, answer = 40 + len(rows[at]["question"]) // 4, len(rows[at]["answer"]) // 3
        lengths += [prompt + int(min(256, max(5, answer * rng.lognormal(0, 0.3)))) for _ in range(8)]
    return lengths


@pytest.mark.parametrize(("count", "shards"), [(128, 1), (256, 1), (1024, 8)])
def test_little_padding_on_lengths_like_gsm8k(assets, count, shards):
    geometry = make_geometry(longest=550, shortest=20, num_sequences=count, per_device=16, shards=shards)
    found = [lay_out_step(gsm8k_like(assets, count, seed), geometry).efficiency for seed in range(10)]
    assert np.mean(found) >= 0.95


def test_a_step_token_by_token():
    """Three completions in rows of 128; the masked one is read but not trained on; everything else is 0."""
    rollouts = [make_rollout(2, 3, 1), make_rollout(1, 2, 2), make_rollout(2, 2, 3, "length")]
    geometry = make_geometry(longest=5, shortest=3, num_sequences=3, per_device=4, shards=1)
    layout = lay_out_step([5, 3, 4], geometry)
    advantages, counts, weights = (np.asarray(x) for x in ([1.5, -1.0, 2.0], [3.0, 2.0, 0.0], [0.1, 0.2, 0.3]))
    batch = build_step(rollouts, advantages, counts, weights, layout, geometry, [0])
    (row,) = (row for row in layout.rows if row)
    assert row == (0, 2, 1)
    used = slice(0, 12)
    assert batch.tokens[0, 0, used].tolist() == [100, 101, 102, 103, 104, 300, 301, 302, 303, 200, 201, 202]
    assert batch.positions[0, 0, used].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.segment_ids[0, 0, used].tolist() == [1] * 5 + [2] * 4 + [3] * 3
    assert batch.loss_mask[0, 0, used].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    np.testing.assert_allclose(batch.loss_weight[0, 0, used], [0, 0, 0.1, 0.1, 0.1, 0, 0, 0, 0, 0, 0.2, 0.2])
    assert batch.advantages is not None and batch.sampler_logprobs is not None
    np.testing.assert_allclose(batch.advantages[0, 0, used], [0, 0, 1.5, 1.5, 1.5, 0, 0, 0, 0, 0, -1, -1])
    np.testing.assert_allclose(batch.sampler_logprobs[0, 0, used], [0, 0, -1, -1, -1, 0, 0, 0, 0, 0, -1, -1])
    assert batch.max_segments == 128 // 3  # what any step could have; of its own rows where that is asked for
    told = build_step(rollouts, advantages, counts, weights, layout, geometry, [0], counts_documents=True)
    assert told.max_segments == 8
    rest = slice(12, None)
    assert not any(np.any(leaf[..., rest]) for leaf in (batch.tokens, batch.segment_ids, batch.loss_weight))
