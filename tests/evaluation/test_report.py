"""What people read says what the numbers say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from counterpoint.evaluation.report import latex, markdown, plain, records, sentences
from counterpoint.evaluation.statistics import jackknife, resample
from counterpoint.evaluation.suite import Row
from counterpoint.metrics.distribution import kernel_distance
from counterpoint.metrics.metric import Metric


def metric(name: str, values: torch.Tensor, **settings: object) -> Metric:
    made = Metric(name, lambda rows: rows, **settings)
    made.update(values)
    return made


@pytest.fixture
def rows() -> list[Row]:
    noise = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [
        Row(
            "sum",
            "pose+seg",
            (metric("iou", noise), metric("mse_seg", noise, higher=False), metric("clip", noise)),
            rival=True,
        ),
        Row(
            "mean",
            "pose+seg",
            (metric("iou", noise + 0.1), metric("mse_seg", noise + 0.1, higher=False), metric("clip", other)),
            rival=True,
        ),
        Row("sum", "pose+depth", (metric("iou", noise),), rival=True),
    ]


def test_only_differences_that_hold_are_said(rows: list[Row]) -> None:
    said = sentences(rows)
    assert len(said) == 2, said
    assert said[0].startswith("pose+seg: mean beats sum in iou by 0.1 (95 % interval 0.1 to 0.1, 60 pairs")
    assert said[1].startswith("pose+seg: sum beats mean in mse_seg by 0.1")


def test_few_pairs_prove_nothing(rows: list[Row]) -> None:
    few = [Row(row.name, row.case, tuple(metric(one.name, one.rows[:5]) for one in row.metrics), True) for row in rows]
    assert sentences(few) == []
    assert not any("than_first" in one for row in records(few, "tiny") for one in row["metrics"].values())


def test_parts_are_no_rivals(rows: list[Row]) -> None:
    """A codec and a judge stand in one table, and have nothing in common."""
    parts = [*(Row(row.name, row.case, row.metrics) for row in rows[:2]), Row("codec", "pose+seg", rows[2].metrics)]
    assert sentences(parts) == []
    assert "**" not in markdown(records(parts[:2], "tiny")).replace("**pose+seg**", "")
    canny, depth = metric("value", torch.rand(2)), metric("value", torch.rand(2), higher=False)
    made = records([Row("canny", "all", (canny,)), Row("depth", "all", (depth,))], "tiny")
    assert "|  | value |" in markdown(made), "which way is better differs"
    assert "value \\\\" in latex(made)


def test_records_have_the_documented_form(rows: list[Row]) -> None:
    record = records(rows, "tiny")[0]
    assert record.keys() == {"model", "name", "case", "metrics", "rival"}
    part = replace(rows[0], rival=False, note="nothing to compete with")
    assert records([part], "tiny")[0].keys() == {"model", "name", "case", "metrics", "note"}
    assert record["metrics"]["iou"].keys() >= {"mean", "low", "high"}


def test_tables(rows: list[Row]) -> None:
    made = records(rows, "tiny")
    assert "**" in markdown(made)
    assert markdown(made).count("| sum |") == 2
    bold = next(line for line in markdown(made).splitlines() if line.startswith("| mean"))
    assert bold.count(" ▲") == bold.count(" ▼") == 1, "what the sentences say, against the first row"
    assert "▲" not in next(line for line in markdown(made).splitlines() if line.startswith("| sum"))
    assert "▲" not in markdown(made[:1])
    assert bold.count("**") == 2 + 2 * (made[1]["metrics"]["clip"]["mean"] > made[0]["metrics"]["clip"]["mean"])
    assert r"mse\_seg $\downarrow$" in latex(made)
    assert latex(made).count(r"\begin{tabular}") == 2
    assert "pose+depth" in plain(made)


def test_what_does_not_compete_is_neither_best_nor_in_the_way() -> None:
    truth, low, high = (Row(name, "all", (metric("value", torch.full((3,), at)),), rival=name != "truth")
                        for name, at in (("truth", 1.0), ("low", 0.25), ("high", 0.5)))  # fmt: skip
    made = markdown(records([truth, low, high], "tiny"))
    assert made.count("**0.500**") == 1
    assert made.count("**0.") + made.count("**1.") == 1
    assert "**0." not in markdown(records([truth, low], "tiny")), "the only rival is no best one"


def test_small_numbers_and_foreign_names() -> None:
    flat = Metric("niqe", lambda rows: rows)
    flat.add(torch.tensor([1.0, torch.nan]))
    small = Row(
        "a|b",
        "50% of #1_{x}~",
        (metric("kid", torch.full((3,), 4.6e-5)), flat),
    )
    made = records([small], "tiny")
    value = made[0]["metrics"]["niqe"]
    assert (value["mean"], value["low"], value["note"]) == (None, None, "no finite number for 1 of 2")
    assert "4.6e-05" in plain(made)
    assert r"| a\|b | 4.6e-05 ± 0.000 | – |" in markdown(made)
    names = latex(records([Row("#$_{}%&^", "case", small.metrics)], ""))
    assert r"\#\$\_\{\}\%\&\textasciicircum{} &" in names


def test_two_samples_of_a_distance_have_no_interval() -> None:
    kid = Metric("kid", lambda x: x, lambda x: kernel_distance(x[:, 0], x[:, 1]), distinct=True)
    kid.add(torch.rand(2, 2, 3))
    (row,) = records([Row("sum", "case", (kid,))], "")
    assert row["metrics"]["kid"]["mean"] is not None
    assert row["metrics"]["kid"]["low"] is None


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="pairs"):
        resample(metric("iou", torch.zeros(3))).minus(resample(metric("iou", torch.zeros(4))))


def test_distances_between_sets_are_not_bootstrapped() -> None:
    """Drawing a sample twice would bias them: the jackknife's interval holds the truth of equal sets."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(60):
        rows = torch.randn(80, 2, 3, generator=generator, dtype=torch.float64)
        kid = Metric("kid", lambda x: x, lambda x: kernel_distance(x[:, 0], x[:, 1]), distinct=True)
        kid.update(rows)
        found = resample(kid).interval()
        hits += found.low <= 0 <= found.high
        assert found == jackknife(kid.rows, kid.reduce)
    assert hits >= 52
