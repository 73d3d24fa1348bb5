import pytest

from r1jax.trackers.tracker import chart_name


@pytest.mark.parametrize(
    ("metric", "chart"),
    [
        ("loss", "train/loss"),
        ("eval_loss", "eval/loss"),
        ("time/step", "train/time/step"),
        ("evaluated", "train/evaluated"),
    ],
)
def test_chart_names_are_those_of_hf(metric, chart):
    assert chart_name(metric) == chart
