"""A built wheel, in an environment with nothing else, makes a picture."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import SPLITS, scene

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("tiny")]
ROOT = Path(__file__).parents[2]


def run(*arguments: object, cwd: Path) -> str:
    result = subprocess.run([str(a) for a in arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert wheel.stat().st_size < 60e6
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        "torch",
        cwd=tmp_path,
    )
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        wheel,
        cwd=tmp_path,
    )
    installed = run(
        python, "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check", cwd=tmp_path
    ).lower()
    assert "torchvision" not in installed
    pose = tmp_path / "pose.png"
    Image.fromarray(control_map(scene(SPLITS["test"].start), "pose")).save(pose)
    record = json.loads(
        run(
            tmp_path / "empty" / "bin" / "counterpoint",
            "generate",
            "a person on a meadow",
            "--control",
            f"pose={pose}",
            "--report",
            "--steps",
            "2",
            "--json",
            cwd=tmp_path,
        )
    )
    with Image.open(tmp_path / record["images"][0]) as picture:
        assert picture.size == (128, 128)
    assert (tmp_path / record["images"][0]).with_suffix(".html").is_file(), "pages travel in the wheel"
