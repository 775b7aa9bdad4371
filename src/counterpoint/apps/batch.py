"""Thousands of requests from one file, in real batches, on this machine or a Ray cluster; killed, it goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from counterpoint.apps import record
from counterpoint.apps.cluster import its_device, map_on_ray
from counterpoint.apps.replay import recipe_of
from counterpoint.apps.request import GenerateRequest, build
from counterpoint.apps.run import (
    OneModel,
    Opened,
    alike,
    free_memory,
    is_out_of_memory,
    model_key,
    open_request,
    run_together,
)
from counterpoint.models.load import BUILT_IN
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import UserError

RESULTS = "results.jsonl"


class JobRequest(GenerateRequest):
    """A line of a job file: a request with a name, which its picture gets."""

    id: str = Field(pattern=r"^[\w.-]{1,120}$")

    @field_validator("id")
    @classmethod
    def _short(cls, name: str) -> str:
        if len(name.encode()) > 200:  # file systems count bytes, and a picture's name has more than its job's
            raise ValueError("an id has at most 200 bytes")
        return name


@dataclass(frozen=True)
class Jobs:
    """A job file: what it asks for, its bad lines by number, with reasons, and each job's line."""

    requests: tuple[JobRequest, ...]
    bad: Mapping[int, str]
    lines: Mapping[str, int]


def read_jobs(path: Path, device: str = "cpu", dtype: str = "fp32") -> Jobs:
    """Read a file with a request in JSON a line, with the keys of ``generate``; ``id`` defaults to the line's number,
    paths count from the file's folder.

    Args:
        path: the file.
        device: of lines that name none.
        dtype: likewise.

    Raises:
        UserError: the file cannot be read, or has no job at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the jobs {path}: {error}") from None
    requests: list[JobRequest] = []
    bad: dict[int, str] = {}
    taken: dict[Path, str] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = _job(line, path.parent, {"id": f"{number:06d}", "device": device, "dtype": dtype})
            files = _files(job, Path())
            if job.id in numbers:
                raise UserError(f"its id {job.id!r} is an earlier one's")
            if both := [file for file in files if file in taken]:
                raise UserError(
                    f"its picture {both[0]} would be called as one of {taken[both[0]]!r}: name it otherwise"
                )
            requests.append(job)
            numbers[job.id] = number
            taken |= dict.fromkeys(files, job.id)
        except UserError as error:
            bad[number] = str(error)
    if not requests and not bad:
        raise UserError(f"{path} holds no jobs")
    return Jobs(tuple(requests), bad, numbers)


def _job(line: str, folder: Path, defaults: Mapping[str, str]) -> JobRequest:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"it is not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError("it is no JSON object")
    return _standing_in(folder, build(JobRequest, **{**defaults, **content}))


def run_jobs(
    requests: Sequence[JobRequest],
    out: Path,
    *,
    batch_size: int = 16,
    ray: str | None = None,
    listen: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Make the pictures of jobs as ``out/ID.png``, or ``out/ID-SEED.png`` of a job that wants several, each whole or
    not at all and each the same as alone, to rounding. What is there is not made again.

    ``out/results.jsonl`` gets a line for each job when it ends: ``id``, ``images``, ``seconds``, or ``error``.

    Args:
        requests: the jobs.
        out: where pictures go.
        batch_size: pictures at a time.
        ray: address of a Ray cluster that sees the same folders, or ``"local"``.
        listen: hears ``(jobs done, jobs in all)``.

    Returns:
        Job -> why it failed.

    Raises:
        UserError: ``out`` holds pictures of other jobs with the same names, or what a picture is made from would be
            overwritten by one; or no cluster answers.
    """
    record.check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    done = _finished(requests, out)
    todo = [job for job in requests if job.id not in done]
    made_from = {path for job in requests for path in job.inputs}
    record.check_spared((file for job in todo for file in _files(job, out)), made_from)
    chunks = _chunks(todo, batch_size)
    failed: dict[str, str] = {}
    count, digests = len(done), {job.id: _digest(job) for job in todo}
    _end_line(out / RESULTS)
    for lines in _carried_out(chunks, out, ray):
        with (out / RESULTS).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**line, "job": digests[line["id"]]}) + "\n" for line in lines)
        failed |= {line["id"]: line["error"] for line in lines if "error" in line}
        count += len(lines)
        if listen is not None:
            listen(count, len(requests))
    return failed


def _end_line(path: Path) -> None:
    """What a kill cut off ends there: the next line is one of its own."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def _digest(job: JobRequest) -> str:
    return hashlib.sha256(job.model_dump_json().encode()).hexdigest()[:16]


def _files(job: JobRequest, out: Path) -> list[Path]:
    if job.n == 1:
        return [out / f"{job.id}.png"]
    return [out / f"{job.id}-{job.seed + i}.png" for i in range(job.n)]


def _finished(requests: Sequence[JobRequest], out: Path) -> set[str]:
    """Jobs whose pictures are there; a line that a kill cut off counts for nothing."""
    known: dict[str, str] = {}
    path = out / RESULTS
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            line = json.loads(text)
            if "error" not in line:
                known[line["id"]] = line["job"]
        except (ValueError, KeyError, TypeError):
            continue
    done = set()
    for job in requests:
        if job.id not in known or not all(file.exists() for file in _files(job, out)):
            continue
        if known[job.id] != _digest(job):
            raise UserError(f"{out} holds the picture of another job called {job.id}: choose another --out")
        done.add(job.id)
    return done


def _chunks(jobs: Sequence[JobRequest], size: int) -> list[list[JobRequest]]:
    """Batches of jobs that are alike, models one after the other; a job that wants several pictures is one."""
    groups: dict[str, list[JobRequest]] = {}
    for job in jobs:
        groups.setdefault(f"{model_key(job)} {alike(job)} {job.id if job.n > 1 else ''}", []).append(job)
    ordered = [groups[key] for key in sorted(groups)]
    return [group[start : start + size] for group in ordered for start in range(0, len(group), size)]


class _Worker:
    """Carries batches out."""

    def __init__(self, out: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self.out, self.models = out, OneModel()

    def __call__(self, chunk: str) -> str:
        """A batch as JSON -> its lines of results as JSON."""
        jobs = [build(JobRequest, **content) for content in json.loads(chunk)]
        return json.dumps(self.carry_out(jobs))

    def carry_out(self, jobs: Sequence[JobRequest]) -> list[dict[str, Any]]:
        """One line a job."""
        opened: list[Opened] = []
        lines: list[dict[str, Any]] = []
        for job in jobs:
            try:
                opened.append(open_request(job))
            except Exception as error:
                lines.append(_failed(job, error))
        if not opened:
            return lines
        try:
            pipe = self.models.of(jobs[0])
        except Exception as error:
            return [*lines, *(_failed(one.request, error) for one in opened)]
        return [*lines, *self._sample(opened, pipe)]

    def _sample(self, opened: Sequence[Opened], pipe: Pipeline) -> list[dict[str, Any]]:
        """A batch that fails is halved until whoever is to blame is alone, whatever it is to blame for."""
        began, failure = time.perf_counter(), None
        try:
            results = run_together(opened, pipe)
        except Exception as error:  # no longer than this: its traceback holds what the attempt had in memory
            failure = _failed(opened[0].request, error)
        if failure is not None:
            free_memory()
            if len(opened) == 1:
                return [failure]
            half = len(opened) // 2
            return [*self._sample(opened[:half], pipe), *self._sample(opened[half:], pipe)]
        seconds = (time.perf_counter() - began) / len(opened)
        lines = []
        for one, result in zip(opened, results, strict=True):
            files, recipe = _files(one.request, self.out), recipe_of(result)
            for file, image, seed in zip(files, result.images, result.seeds, strict=True):
                record.save_png(image, file, {**recipe, "seed": seed})
            names = [file.name for file in files]
            lines.append({"id": one.request.id, "images": names, "seconds": round(seconds, 4)})
        return lines


def _failed(job: GenerateRequest, error: Exception) -> dict[str, Any]:
    if is_out_of_memory(error):
        return {"id": job.id, "error": "out of memory"}
    reason = str(error) if isinstance(error, UserError) else f"internal error: {type(error).__name__}: {error}"
    return {"id": job.id, "error": " ".join(reason.split())}


def _standing_in(folder: Path, job: JobRequest) -> JobRequest:
    """The same with all its paths counted from a folder; what is no file or folder there is a name or a hub id."""

    def whole(source: str | None) -> str | None:
        if not source or source == BUILT_IN:
            return source
        path, colon, scale = source.rpartition(":")
        if colon and (folder / path).exists():
            return f"{folder / path}:{scale}"
        return str(folder / source) if (folder / source).exists() else source

    controls = tuple(
        one.model_copy(update={name: whole(getattr(one, name)) for name in ("controlnet", "probe", "extractor")})
        for one in job.controls
    )
    named = {
        "lora": tuple(whole(one) for one in job.lora),
        "aggregate": tuple(whole(one) if Path(one).name != one or Path(one).suffix else one for one in job.aggregate),
    }  # a model's own adapters have names, which come before folders
    single = {name: whole(getattr(job, name)) for name in ("model", "config")}
    return job.model_copy(update={"controls": controls, **named, **single}).inside(folder)


def _carried_out(chunks: Sequence[Sequence[JobRequest]], out: Path, ray: str | None) -> Iterator[list[dict[str, Any]]]:
    if not chunks:
        return
    if ray is None:
        worker = _Worker(out, torch.get_num_threads())
        for chunk in chunks:
            yield worker.carry_out(chunk)
        return
    items: dict[str, list[str]] = {}
    for chunk in chunks:
        device = its_device(chunk[0].device)
        jobs = [_standing_in(Path.cwd(), job).model_copy(update={"device": device}) for job in chunk]
        items.setdefault(device, []).append(json.dumps([job.model_dump(mode="json") for job in jobs]))
    for device, some in items.items():
        for _, lines in map_on_ray(ray, partial(_Worker, out.resolve(), 1), some, device=device):
            yield json.loads(lines or "[]")
