"""What operations need is counted once, and held against what this machine can do."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from counterpoint.sampling import floor
from counterpoint.sampling.floor import Ledger, Operation, Rates, rates, uncounted, work

CPU = torch.device("cpu")


@pytest.mark.parametrize("fake", [False, True])
def test_weights_are_read_and_not_made(fake: bool) -> None:
    """A linear layer's transposed weight is a view of it."""
    layer, shapes_alone = torch.nn.Linear(100, 300), FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), shapes_alone if fake else nullcontext(), Ledger() as ledger:
        layer(torch.empty(2, 100))
    (one,) = ledger.operations
    assert one == Operation("matrix", torch.float32, 2 * 2 * 100 * 300, 4 * (200 + 600 + 300 + 30_000))
    assert ledger.peak == 4 * (200 + 600)


def test_what_makes_nothing_or_reads_little_costs_little() -> None:
    table, whole, row = torch.zeros(1000, 8), torch.zeros(4, 8), torch.zeros(1, 8)
    places = torch.zeros(3, dtype=torch.long)
    with Ledger() as ledger:
        whole.add_(1)
        whole[:2].reshape(-1)
        torch.empty(10_000)
        with uncounted():
            torch.zeros(10_000)
    assert not ledger.operations
    with Ledger() as ledger:
        F.embedding(places, table)
        row.expand(4, 8) + 1
    assert [one.moved for one in ledger.operations] == [4 * (24 + 24), 4 * (32 + 8)]


def test_gradients_are_counted() -> None:
    """The CPU's attention, whose operations torch has no formulas for, as that of an accelerator."""
    sizes = (2, 3, 16, 8)
    query, key, value = (torch.zeros(*sizes, requires_grad=True) for _ in range(3))
    with Ledger() as ledger:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    forward = 2 * 2 * query.numel() * 16
    assert sum(one.flops for one in ledger.operations if one.kind == "attention") == forward * (1 + 5 / 2)
    layer = torch.nn.Conv2d(4, 6, 3)
    with Ledger() as ledger, FlopCounterMode(display=False) as known:
        layer(torch.zeros(1, 4, 9, 9)).sum().backward()
    assert sum(times * one.flops for one, times in ledger.operations.items()) == known.get_total_flops()


def test_every_operation_takes_as_long_as_its_arithmetic_or_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Rates(20.0, 20.0, 20.0, 1.0)
    known = {torch.float32: Rates(10.0, 5.0, 2.0, 1.0), torch.bfloat16: half}
    monkeypatch.setattr(floor, "rates", lambda _, dtype: known[dtype])
    matrix = Operation("matrix", torch.float32, 100.0, 4)
    found = work({matrix: 2.0, Operation("conv", torch.bfloat16, 100.0, 4): 1.0}, CPU)
    assert (found.flops, found.moved, found.seconds) == (300.0, 12.0, 2 * 10.0 + 5.0)
    copied = Operation("matrix", torch.float64, 0.0, 7)
    assert work({copied: 1.0}, CPU).seconds == 7.0, "of what does not count, only bytes"


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, ones = [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, **more: copied.append(sizes) or ones(*sizes, **more))
    rates.cache_clear()
    assert min(vars(rates(CPU, torch.float32)).values()) > 1e6
    assert max(4 * size for (size,) in copied) >= 2**28, "more than a cache holds is copied"
