"""Job files: real batches that equal single runs, one bad line among good ones, and what a kill leaves."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from counterpoint.apps import batch
from counterpoint.apps.batch import JobRequest, read_jobs, run_jobs
from counterpoint.apps.request import GenerateRequest, build
from counterpoint.apps.run import run
from counterpoint.types import UserError
from tests.conftest import noise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, sigma in (("a", 40), ("b", 80), ("mask", 60)):
        noise((128, 128), sigma).save(tmp_path / f"{name}.png")
    return tmp_path


def control(label: str = "pose", image: str = "a.png", **more: Any) -> dict[str, Any]:
    return {"label": label, "image": image, **more}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


JOBS = (
    {"id": "plain", "prompt": "a red ball", "seed": 1, "steps": 2},
    {"id": "other", "prompt": "a blue box on a beach", "negative_prompt": "a person", "seed": 2, "steps": 2},
    {"id": "pose-1", "prompt": "a person", "controls": [control(weight="0.5"), control("seg", "b.png")], "steps": 2},
    {"id": "pose-2", "prompt": "a person", "seed": 9, "steps": 2,
     "controls": [control(window=[0, 0.5]), control("seg", "a.png", weight="0:1,0.5:0")]},
    {"id": "masked", "prompt": "a person", "controls": [control(mask="mask.png"), control("seg", "b.png")], "steps": 2},
    {"id": "pix", "prompt": "a person", "controls": [control(), control("seg", "b.png")], "steps": 2, "fusion": "pix"},
    {"id": "cross-1", "prompt": "a person on a meadow", "controls": [control(), control("seg", "b.png")], "steps": 2,
     "fusion": "cross", "subject": ["person"]},
    {"id": "cross-2", "prompt": "a person on a beach", "controls": [control(), control("seg", "b.png", weight="0.3")],
     "steps": 2, "fusion": "cross", "subject": ["person"]},
    {"id": "start", "prompt": "a cone", "init_image": "b.png", "steps": 4},
    {"id": "several", "prompt": "a ball", "n": 2, "seed": 5, "steps": 2},
)  # fmt: skip


def test_every_picture_is_what_it_would_be_alone(folder: Path) -> None:
    jobs = read_jobs(written(folder, *JOBS))
    assert jobs.bad == {}
    assert run_jobs(jobs.requests, folder / "out", batch_size=8) == {}
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {job["id"] for job in JOBS}
    for job in jobs.requests:
        alone = run(job)
        names = [f"{job.id}.png"] if job.n == 1 else [f"{job.id}-{seed}.png" for seed in alone.seeds]
        for name, image in zip(names, alone.images, strict=True):
            made = np.asarray(PIL.Image.open(folder / "out" / name), int)
            assert np.abs(made - np.asarray(image, int)).max() <= 2, name


def test_jobs_that_are_alike_share_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    whole = batch.run_together
    monkeypatch.setattr(batch, "run_together", lambda opened, pipe: sizes.append(len(opened)) or whole(opened, pipe))
    run_jobs(read_jobs(written(folder, *JOBS)).requests, folder / "out", batch_size=8)
    assert sorted(sizes) == [1, 1, 1, 1, 1, 1, 2, 2]


def test_one_bad_line_is_named_and_the_rest_runs(cli, folder: Path) -> None:
    path = written(
        folder, JOBS[0], "{", {"prompt": "a", "steps": 0}, {"prompt": "a", "colour": 1}, JOBS[0], [1],
        {"id": "../x", "prompt": "a"}, "", {"id": "lost", "prompt": "a", "controls": [control(image="none.png")]},
        {"prompt": "a cone", "steps": 2},
    )  # fmt: skip
    status, out, error = cli("batch", path, "--out", folder / "out", "--json")
    assert status == 2
    found = json.loads(out)
    assert found["done"] == 2
    assert sorted(found["bad_lines"]) == ["2", "3", "4", "5", "6", "7"]
    assert "none.png" in found["failed"]["lost"]
    assert "line 9 of" in error
    for said in (
        "line 2 of",
        "is not JSON",
        "line 3 of",
        "steps",
        "line 4 of",
        "colour",
        "line 5 of",
        "earlier one's",
        "line 7",
    ):
        assert said in error
    assert sorted(path.name for path in (folder / "out").glob("*.png")) == ["000010.png", "plain.png"]


def test_finished_jobs_are_not_made_again(cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder, *JOBS[:2])
    assert cli("batch", path, "--out", folder / "out")[0] == 0
    with (folder / "out" / "results.jsonl").open("a") as file:
        file.write('{"id": "other", "jo')  # a kill
    (folder / "out" / "plain.png").unlink()
    made = []
    whole = batch.run_together
    monkeypatch.setattr(
        batch, "run_together", lambda opened, pipe: made.extend(one.request.id for one in opened) or whole(opened, pipe)
    )
    assert cli("batch", path, "--out", folder / "out")[0] == 0
    assert made == ["plain"]
    status, _, error = cli("batch", written(folder, {**JOBS[0], "seed": 77}), "--out", folder / "out")
    assert status == 2
    assert "holds the picture of another job called plain" in error


def test_pictures_carry_recipes_that_replay(cli, folder: Path) -> None:
    run_jobs(read_jobs(written(folder, *JOBS[2:4])).requests, folder / "out")
    status, out, error = cli("replay", folder / "out" / "pose-1.png", "--verify")
    assert status in {0, 1}
    if status:
        assert "pictures at once: 2 -> 1" in error
        assert int(out.split("up to ")[1].split()[0]) <= 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (IndexError("a fault\nof ours"), "internal error: IndexError: a fault of ours"),
    ],
)
def test_who_fails_alone_fails_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    whole = batch.run_together

    def tight(opened: list, pipe: object) -> list:
        if any(one.request.id == "b" for one in opened):
            raise error
        return whole(opened, pipe)

    monkeypatch.setattr(batch, "run_together", tight)
    jobs = [JobRequest(id=name, prompt="a ball", steps=1) for name in "abcd"]
    assert run_jobs(jobs, folder / "out") == {"b": said}
    assert sorted(path.stem for path in (folder / "out").glob("*.png")) == ["a", "c", "d"]


def test_a_failed_attempt_is_out_of_memory_before_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what stands in a cycle of references."""
    whole, held = batch.run_together, []

    def tight(opened: list, pipe: object) -> list:
        assert not any(one() for one in held)
        if len(opened) == 1:
            return whole(opened, pipe)
        latents = torch.zeros(8)
        latents.itself = latents
        held.append(weakref.ref(latents))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(batch, "run_together", tight)
    jobs = [JobRequest(id=name, prompt="a ball", steps=1) for name in "abcd"]
    assert run_jobs(jobs, folder / "out") == {}
    assert len(held) == 3


def test_lines_are_what_newlines_end(folder: Path) -> None:
    """Not U+2028, which JSON allows in a text; a line that is nested too deeply is a bad one."""
    path = folder / "jobs.jsonl"
    lines = [json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), "[" * 200_000, '{"prompt": "c", "device": "mps"}']
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    jobs = read_jobs(path, "cuda", "bf16")
    assert [(job.prompt, job.device, job.dtype) for job in jobs.requests] == [
        ("a\u2028b", "cuda", "bf16"),
        ("c", "mps", "bf16"),
    ]
    assert list(jobs.bad) == [2]
    assert "is not JSON" in jobs.bad[2]


def test_pictures_of_two_jobs_are_not_called_the_same(folder: Path) -> None:
    path = written(
        folder, {"id": "a", "prompt": "x", "n": 2}, {"id": "a-1", "prompt": "y"}, {"id": "a-2", "prompt": "z"}
    )
    jobs = read_jobs(path)
    assert [job.id for job in jobs.requests] == ["a", "a-2"]
    assert "its picture a-1.png would be called as one of 'a'" in jobs.bad[2]
    assert jobs.lines == {"a": 1, "a-2": 3}


def test_a_line_that_a_kill_cut_off_swallows_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_carried_out", lambda *_: iter([[{"id": "b", "images": ["b.png"]}]]))
    (folder / "out").mkdir()
    results = folder / "out" / "results.jsonl"
    results.write_text('{"id": "a", "jo')
    run_jobs([JobRequest(id="b", prompt="x")], folder / "out")
    last = json.loads(results.read_text().split("\n")[1])
    assert (last["id"], last["images"]) == ("b", ["b.png"])


def test_paths_hold_on_other_machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was made there counts as done here."""
    monkeypatch.chdir(folder)
    (folder / "net").mkdir()
    told: list[str] = []

    def elsewhere(_: str, __: Any, items: list[str], device: str) -> Any:
        told.extend(items)
        (job,) = json.loads(items[0])
        PIL.Image.new("RGB", (8, 8)).save(folder / "out" / f"{job['id']}.png")
        yield items[0], json.dumps([{"id": job["id"], "images": [f"{job['id']}.png"], "seconds": 1}])

    monkeypatch.setattr(batch, "map_on_ray", elsewhere)
    line = {"id": "a", "prompt": "x", "lora": ["net:0.5"], "model": "tiny",
            "controls": [control(controlnet="net", mask="mask.png")]}  # fmt: skip
    jobs = read_jobs(Path(written(folder, line).name)).requests
    assert run_jobs(jobs, folder / "out", ray="local") == {}
    (job,) = json.loads(told[0])
    (one,) = job["controls"]
    assert (one["image"], one["mask"], one["controlnet"]) == (
        str(folder / "a.png"), str(folder / "mask.png"), str(folder / "net"),
    )  # fmt: skip
    assert (job["model"], job["lora"]) == ("tiny", [f"{folder / 'net'}:0.5"])
    run_jobs(jobs, folder / "out", ray="local")
    assert len(told) == 1


def test_paths_count_from_the_files_folder(tmp_path: Path) -> None:
    """Of networks too; what is not there is a name."""
    folder = tmp_path / "deep"
    (folder / "net").mkdir(parents=True)
    (folder / "lora.safetensors").write_text("")
    line = {"prompt": "x", "lora": ["lora.safetensors:0.5", "owner/lora"], "model": "net", "aggregate": ["style"],
            "controls": [control(controlnet="net"), control("seg", controlnet="owner/net")]}  # fmt: skip
    (job,) = read_jobs(written(folder, line)).requests
    assert (job.model, job.lora, job.aggregate) == (
        str(folder / "net"), (f"{folder / 'lora.safetensors'}:0.5", "owner/lora"), ("style",),
    )  # fmt: skip
    assert [one.controlnet for one in job.controls] == [str(folder / "net"), "owner/net"]


def test_what_cannot_be_written_is_a_bad_line(folder: Path) -> None:
    lines = ({"prompt": "\ud800"}, {"id": "界" * 80, "prompt": "x"}, {"id": "界" * 60, "prompt": "x", "steps": 1})
    jobs = read_jobs(written(folder, *lines))
    assert "half a character" in jobs.bad[1]
    assert "at most 200 bytes" in jobs.bad[2]
    assert run_jobs(jobs.requests, folder / "out") == {}


def test_what_pictures_are_made_from_is_not_overwritten(folder: Path) -> None:
    before = (folder / "a.png").read_bytes()
    jobs = read_jobs(written(folder, {"id": "a", "prompt": "x", "controls": [control()]}))
    with pytest.raises(UserError, match="is what the picture is made from"):
        run_jobs(jobs.requests, folder)
    assert (folder / "a.png").read_bytes() == before


def test_workers_have_what_their_jobs_run_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores for some, a GPU of its own for others: the first that it sees."""
    asked: dict[str, list[tuple[str, str]]] = {}

    def elsewhere(_: str, __: Any, items: list[str], device: str) -> Any:
        jobs = [job for item in items for job in json.loads(item)]
        asked[device] = [(job["id"], job["device"]) for job in jobs]
        yield "", json.dumps([{"id": job["id"], "images": [], "seconds": 1} for job in jobs])

    monkeypatch.setattr(batch, "map_on_ray", elsewhere)
    devices = {"a": "cpu", "b": "cuda", "c": "cuda:1", "d": "cpu"}
    jobs = [JobRequest(id=name, prompt="x", device=device, dtype="fp32") for name, device in devices.items()]
    assert run_jobs(jobs, folder / "out", ray="local") == {}
    assert {device: sorted(found) for device, found in asked.items()} == {
        "cpu": [("a", "cpu"), ("d", "cpu")],
        "cuda": [("b", "cuda"), ("c", "cuda")],
    }


def test_a_file_that_is_no_job_file(cli, folder: Path) -> None:
    for content, said in (("", "holds no jobs"), (None, "cannot read the jobs")):
        path = folder / "jobs.jsonl"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        status, _, error = cli("batch", path)
        assert status == 2
        assert said in error
    with pytest.raises(UserError, match="cannot read"):
        read_jobs(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "prompt: it is wanted"),
        ({"prompt": "a person", "step": 4}, "step: there is no such key; steps?"),
        ({"prompt": "a person", "controls": {"pose": "pose.png"}}, "--controls: input should be a valid list"),
    ],
)
def test_a_job_is_told_what_is_wrong_with_it(content: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        build(GenerateRequest, **content)
    assert str(error.value).startswith(said)


def test_one_name_stands_for_a_list_of_one() -> None:
    request = build(GenerateRequest, prompt="a person", subject="person", foreground="pose")
    assert (request.subject, request.foreground) == (("person",), ("pose",))
