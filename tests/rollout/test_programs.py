import pytest

from r1jax.rollout.programs import bucket


@pytest.mark.parametrize(("number", "expected"), [(1, 16), (16, 16), (17, 32), (33, 48), (49, 64), (65, 96), (97, 128)])
def test_buckets(number, expected):
    assert bucket(number) == expected


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12)])
def test_buckets_from_one(number, expected):
    assert bucket(number, 1) == expected
