"""Data order and noise: no state, no neighbours."""

from __future__ import annotations

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.training.order import Draws, Order, sample_index


@given(length=st.integers(1, 50), seed=st.integers(0, 9))
def test_an_epoch_is_a_permutation(length: int, seed: int) -> None:
    for epoch in range(3):
        assert sorted(sample_index(epoch * length + i, length, seed) for i in range(length)) == list(range(length))


def test_epochs_differ() -> None:
    assert [sample_index(i, 50, 0) for i in range(50)] != [sample_index(50 + i, 50, 0) for i in range(50)]


def test_resumed_order_is_the_rest() -> None:
    whole = list(Order(30, 1, 4, 2, 0, 10))
    assert list(Order(30, 1, 4, 2, 6, 10)) == whole[12:]
    assert len(Order(30, 1, 4, 2, 6, 10)) == 8


def test_world_size_does_not_change_what_a_step_sees() -> None:
    one = [sorted(chain.from_iterable(list(Order(30, 1, 8, 1, s, s + 1)))) for s in range(5)]
    two = [
        sorted(chain.from_iterable([b for rank in (0, 1) for b in Order(30, 1, 4, 1, s, s + 1, rank, 2)]))
        for s in range(5)
    ]
    split = [sorted(chain.from_iterable(list(Order(30, 1, 2, 4, s, s + 1)))) for s in range(5)]
    assert one == two == split


def test_a_sample_draws_the_same_beside_anyone() -> None:
    together, alone = Draws(0, [3, 7, 9]), Draws(0, [7])
    assert torch.equal(together.normal(2, 3)[1:2], alone.normal(2, 3))
    assert torch.equal(together.uniform(4)[1:2], alone.uniform(4))
    assert torch.equal(together.integers(1000)[1:2], alone.integers(1000))
    assert not torch.equal(Draws(0, [7]).normal(3), Draws(1, [7]).normal(3))


def test_draws_have_the_right_distribution() -> None:
    draws = Draws(0, range(400))
    assert abs(draws.normal(100).std().item() - 1) < 0.02
    assert abs(draws.uniform(100).mean().item() - 0.5) < 0.01
