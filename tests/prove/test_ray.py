"""Ray: the same suite over workers gives the same pictures and the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

pytestmark = [pytest.mark.prove, pytest.mark.enable_socket]


def test_workers_make_the_same_pictures(cli, tiny: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that two workers have room on two cores
    try:
        arguments = ["evaluate", "conflicting", "-n", 4, "--steps", 2, "--fusion", "sum", "--batch-size", 2, "--json"]
        found = []
        for name, more in (("here", []), ("there", ["--ray", "local"])):
            status, out, error = cli(*arguments, "--out", tmp_path / name, *more)
            assert status == 0, error
            found.append(json.loads(out)["rows"])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    pictures = sorted((tmp_path / "here" / "pictures").rglob("*.png"))
    assert len(pictures) == 8
    for path in pictures:
        assert path.read_bytes() == (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes()


def test_no_cluster_is_said(cli, tiny: Path, tmp_path: Path) -> None:
    status, _, error = cli("evaluate", "conflicting", "-n", 4, "--ray", "127.0.0.1:1", "--out", tmp_path)
    assert status == 2
    assert "no cluster answers" in error


def test_condition_images_of_workers_are_those_of_one_process(cli, tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for number in range(5):
            noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3)).astype(np.uint8)
            PIL.Image.fromarray(noise).save(tmp_path / place / f"{number}.png")
    for place, more in (("here", ["--workers", 1]), ("there", ["--ray", "local"])):
        status, _, error = cli("extract", "canny", tmp_path / place, "--batch", "--balance", *more)
        assert status == 0, error
    made = sorted((tmp_path / "here" / "canny").glob("*.png"))
    assert len(made) == 5
    for path in made:
        assert path.read_bytes() == (tmp_path / "there" / "canny" / path.name).read_bytes()


def test_jobs_of_workers_are_those_of_one_process(cli, tiny: Path, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(f'{{"prompt": "a red ball", "seed": {seed}, "steps": 2}}\n' for seed in range(4)))
    for place, more in (("here", []), ("there", ["--ray", "local"])):
        status, _, error = cli("batch", jobs, "--out", tmp_path / place, "--batch-size", 2, *more)
        assert status == 0, error
    made = sorted((tmp_path / "here").glob("*.png"))
    assert len(made) == 4
    for path in made:
        one, other = (
            np.asarray(PIL.Image.open(folder / path.name), int) for folder in (tmp_path / "here", tmp_path / "there")
        )
        assert np.abs(one - other).max() <= 2
