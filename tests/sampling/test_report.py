"""The report says who was heard, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterpoint.control.reuse import Thrift
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.schedulers import make_scheduler
from tests.conftest import noise

FAST = {"num_inference_steps": 4, "width": 64, "height": 64}


@pytest.fixture
def pipe(parts: dict) -> Pipeline:
    networks = dict(zip(("pose", "seg"), parts["networks"], strict=True))
    scheduler = make_scheduler("unipc", parts["scheduler"].config)
    return Pipeline(parts["vae"], parts["text_encoder"], parts["tokenizer"], parts["unet"], scheduler, networks)


HINTS = [noise((64, 64), sigma) for sigma in (40, 90)]


def run(pipe: Pipeline, **more: object):
    return pipe("a person", HINTS, generator=torch.manual_seed(0), **{"report": True, **more}, **FAST)


def test_it_changes_nothing(pipe: Pipeline) -> None:
    with_it, without = run(pipe, output_type="pt"), run(pipe, output_type="pt", report=False)
    assert torch.equal(with_it.images, without.images)
    assert without.report is None


def test_who_is_masked_or_late_was_not_heard(pipe: Pipeline) -> None:
    left = Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, 0).astype(np.uint8))
    report = run(pipe, control_mask=[left, None], control_guidance_start=[0.0, 0.5], num_images_per_prompt=2).report
    assert report is not None
    assert len(report.maps) == 4
    for step in (0, 1):  # seg is not yet there
        assert set(np.unique(report.winners(step)[:, :4])) == {0}
        assert set(np.unique(report.winners(step)[:, 4:])) == {-1}
    assert set(np.unique(report.winners(3)[:, 4:])) == {1}
    parts = report.shares(1)
    assert sum(parts.values()) == pytest.approx(1)
    assert set(report.regions) == {"pose"}


def test_nobody_was_heard(pipe: Pipeline, tmp_path: Path) -> None:
    report = run(pipe, controlnet_conditioning_scale=0.0).report
    assert report is not None
    assert report.shares() == {"pose": 0, "seg": 0}
    report.save(tmp_path / "silence.html")
    late = run(pipe, control_guidance_end=0.5).report
    assert late is not None
    assert len(late.maps) == 4
    assert set(np.unique(late.winners(3))) == {-1}


def test_a_rule_that_hears_one_control_only(pipe: Pipeline) -> None:
    from counterpoint.types import Fusion

    report = run(pipe, fusion=Fusion("first", "", lambda features: features[0])).report
    assert report is not None
    assert report.shares()["pose"] == pytest.approx(1, abs=1e-3)
    assert set(report.sites[0]) == {"down.0", "down.1", "down.2", "down.3", "mid"}


def test_every_site_tells_winners_agreement_and_opposition(pipe: Pipeline) -> None:
    pipe.controls["seg"] = pipe.controls["pose"]
    report = pipe(
        "a person", [HINTS[0]] * 2, generator=torch.manual_seed(0), gate_silence=False, report=True,
        num_images_per_prompt=2, **FAST,
    ).report  # fmt: skip
    assert report is not None
    site = report.sites[1]["mid"]
    assert site.winners.shape == (2, *site.winners.shape[1:])
    torch.testing.assert_close(site.rho, torch.ones(2))
    torch.testing.assert_close(site.min_norm, torch.full((2, 2), 0.5))
    page = report.html(1, advice=["louder"], thrift={"seg": Thrift(5, 10, 0.125)})
    assert "<td>seg</td><td>50 %</td><td>12 %</td>" in page
    assert page.count("winners at down.0") == 1
    assert "louder" in page


def test_the_page_needs_nothing_but_itself(pipe: Pipeline, tmp_path: Path) -> None:
    report = run(pipe, gate_silence=True).report
    assert report is not None
    report.save(tmp_path / "who-won.html")
    page = (tmp_path / "who-won.html").read_text()
    assert page.count("<figure") == 1 + 2 * 2 + 1 + 4, "picture, two a control, pose's region, four steps"
    assert "a person" in page
    assert "http" not in page.replace("data:image/png;base64", "")
