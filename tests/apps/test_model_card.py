"""The model card shows the first samples, whatever they look like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterpoint.apps.model_card import write_card
from counterpoint.types import UserError


def results(folder: Path, **changes: object) -> Path:
    value = {"mean": 0.9, "low": 0.8, "high": 1.0, "higher": True}
    rows = [{"model": "tiny", "name": "pose", "case": "test scenes", "metrics": {"adherence": value}}]
    record = {
        "suite": "tiny-quality",
        "n": 64,
        "rows": rows,
        "command": "counterpoint evaluate tiny-quality",
        **changes,
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "pictures" / "prompt").mkdir(parents=True)
    for number in range(64):
        shade = np.full((128, 128, 3), 4 * number, np.uint8)
        Image.fromarray(shade).save(folder / "pictures" / "prompt" / f"{number}.png")
    return folder


def test_the_first_64_in_order(tmp_path: Path) -> None:
    for member in ("controls/pose", "controls/seg", "adapters/migc"):
        (tmp_path / "family" / member).mkdir(parents=True)
    write_card(results(tmp_path / "run"), tmp_path / "family", tmp_path / "docs")
    card = (tmp_path / "docs" / "model-card.md").read_text()
    assert "0.9" in card
    assert "ControlNets\nfor pose, seg, adapters migc, probes" in card
    assert "64. a photo of a" in card
    with Image.open(tmp_path / "docs" / "samples.jpg") as sheet:
        assert sheet.size == (1024, 1024)
        shades = np.asarray(sheet.convert("L"), int)[64::128, 64::128].flatten()
    assert np.abs(shades - 4 * np.arange(64)).max() <= 2


@pytest.mark.parametrize("changes", [{"suite": "single"}, {"n": 63}])
def test_other_results_are_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(UserError, match="not tiny-quality of 64"):
        write_card(results(tmp_path / "run", **changes), tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
