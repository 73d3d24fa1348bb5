"""Rollouts of a tiny model with the rewards of a user's function."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.grpo.world import Pieces, assembled, draw, keys


@pytest.fixture(scope="module")
def pieces(world) -> Iterator[Pieces]:
    with assembled(
        keys(
            world, per_device_train_batch_size=8, reward_funcs=["tiny_rewards:likes_w3", "tiny_rewards:brevity"],
            reward_weights=[2.0, 0.25], scale_rewards="batch",
        )
    ) as found:  # fmt: skip
        yield found


@pytest.fixture(scope="module")
def found(pieces: Pieces):
    return draw(pieces, [7, 2, 19], 4, step=5, version=3)


def test_groups_stand_together_in_the_order_asked_for(pieces, found):
    assert found.prompts == [7] * 4 + [2] * 4 + [19] * 4 and [one.sample for one in found.rollouts] == [0, 1, 2, 3] * 3
    for one in found.rollouts:
        begin = int(np.argmax(one.action_mask))
        assert one.tokens[:begin].tolist() == pieces.task.train.ids(one.prompt_id)
        assert one.action_mask[begin:].all() and one.versions[0].version == 3
        assert 1 <= one.num_actions <= 8 and one.truncated == (one.tokens[-1] not in (1, 2))


def test_every_stop_token_ends_a_completion(pieces):
    """<eos> and <stop> both do, as last token and nowhere else; neither counts as cut off."""
    drawn = draw(pieces, range(20), 4, version=3).rollouts
    ends = {int(one.tokens[-1]) for one in drawn if not one.truncated}
    assert ends == {1, 2}
    for one in drawn:
        written = one.tokens[one.action_mask == 1]
        assert not set(written[:-1].tolist()) & {1, 2}
        assert one.truncated == (written[-1] not in (1, 2)) and (len(written) == 8 or not one.truncated)


def test_rewards_are_of_the_words_and_weighted(pieces, found):
    words = [text.split() for text in pieces.collector.texts(found.rollouts)]
    likes = [one.count("w3") / max(len(one), 1) for one in words]
    brevity = [np.nan if one and int(one[0][1:]) % 2 == 0 else -len(one) for one in words]
    np.testing.assert_allclose(found.values, np.stack([likes, brevity], axis=1))
    assert found.reward_names == ("likes_w3", "brevity")
    total = 2 * np.array(likes) + 0.25 * np.nan_to_num(brevity)
    np.testing.assert_allclose(found.rewards, total)
    centred = total - np.repeat(total.reshape(3, 4).mean(axis=1), 4)
    np.testing.assert_allclose(found.advantages, centred / (total.std(ddof=1) + 1e-4))
    assert found.counts["rewards/brevity/none"] == np.isnan(brevity).sum()


def test_a_prompt_keeps_its_samples_among_others_and_another_step_draws_others(pieces, found):
    alone = draw(pieces, [2], 4, step=5, version=3)
    for one, other in zip(alone.rollouts, found.rollouts[4:8], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    later = draw(pieces, [2], 4, step=6, version=3)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(alone.rollouts, later.rollouts, strict=True))


def test_special_tokens_are_no_text(pieces, found):
    assert not any("<" in text for text in pieces.collector.texts(found.rollouts))
    assert any(not one.truncated for one in found.rollouts)


def test_times_are_told(found):
    assert found.seconds["rollout"] > 0 and found.seconds["rewards"] > 0
