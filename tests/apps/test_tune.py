"""Variants are real changes of the request, and only what helps without harm is praised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from counterpoint.apps.readers import control_readers
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.apps.run import Result, run
from counterpoint.apps.tune import Trial, read_back, tune, variants, verdict
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.schedulers import make_scheduler
from tests.conftest import noise


def request(tmp_path: Path, **changes: object) -> GenerateRequest:
    controls = []
    for kind in ("canny", "hed"):
        noise((64, 64), 90).save(tmp_path / f"{kind}.png")
        controls.append(ControlRequest(label=kind, image=tmp_path / f"{kind}.png"))
    settings = {"prompt": "a person", "controls": tuple(controls), "width": 64, "height": 64, "steps": 8, **changes}
    return GenerateRequest(**settings)


def test_variants_change_what_they_say(tmp_path: Path) -> None:
    asked = request(tmp_path, fusion="cross", subject=("person",), gate_silence=False)
    made = dict(variants(asked, {"canny": 0.9, "hed": 0.1}, {"canny": 0.8, "hed": 0.2}))
    assert list(made) == [
        "--fusion pix+channel without --subject",
        "--fusion mgda without --subject",
        "--gate-silence",
        "--weight hed=1.5",
        "--window canny=0:0.6",
        "--weight canny=0.6",
    ]
    assert made["--fusion mgda without --subject"].subject == ()
    assert made["--gate-silence"].gate_silence
    assert made["--weight hed=1.5"].controls[1].weight == "1.5"
    assert made["--window canny=0:0.6"].controls[0].window == (0.0, 0.6)
    assert asked.controls[1].weight == "1"


def test_only_help_without_harm_is_praised() -> None:
    base = Trial("", {"canny": 0.8, "hed": 0.2})
    harm, help_ = Trial("harm", {"canny": 0.3, "hed": 0.5}), Trial("help", {"canny": 0.78, "hed": 0.4})
    none = Trial("none", {"canny": 0.9, "hed": 0.2})
    assert verdict([base, harm, none]) == "nothing that was tried helped: the worst control keeps 0.20"
    assert verdict([base, harm, help_, none]) == "helped: help (0.20 to 0.40)"


def test_controls_are_read_back_from_the_picture() -> None:
    picture = noise((64, 64), 90)
    maps = control_readers(Path("nowhere"), {})
    canny = maps["canny"](torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)
    wanted = canny[0].mul(255).byte().permute(1, 2, 0).numpy()
    result = Result([picture], [0], {"canny": wanted, "depth": wanted}, 0.0, None, None)  # type: ignore[arg-type]
    readings = read_back(result, maps)
    assert set(readings) == {"canny"}, "nothing reads depth here"
    assert readings["canny"].agreement == pytest.approx(1)


def test_trials_are_cheap_and_start_with_what_was_asked(parts: dict, tmp_path: Path) -> None:
    networks = dict(zip(("canny", "hed"), parts["networks"], strict=True))
    scheduler = make_scheduler("unipc", parts["scheduler"].config)
    pipe = Pipeline(parts["vae"], parts["text_encoder"], parts["tokenizer"], parts["unet"], scheduler, networks)
    seen: list[int] = []
    asked = request(tmp_path, n=2, fusion="sum")
    trials = tune(asked, pipe, control_readers(Path("nowhere"), {}), 3, lambda _, total: seen.append(total))
    assert [trial.options for trial in trials] == ["", "--fusion pix+channel", "--fusion mgda", "--gate-silence"]
    assert seen == [3, 3, 3]
    assert pipe.scheduler.num_inference_steps == 6
    cheap = run(asked.model_copy(update={"steps": 6, "n": 1}), pipe)
    assert trials[0].followed == {
        label: reading.agreement for label, reading in read_back(cheap, control_readers(Path("nowhere"), {})).items()
    }
