"""What the service answers."""

from __future__ import annotations

import io
import math
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
import anyio.to_thread
import PIL.Image
import prometheus_client
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from counterpoint.apps.service.checks import check, opened
from counterpoint.apps.service.schema import Accepted, ExtractIn, JobIn, JobOut, Limits, Problem, decode, extractable
from counterpoint.apps.service.state import Service
from counterpoint.apps.service.store import DONE, ENDED, Job
from counterpoint.conditions.plain import PLAIN
from counterpoint.fusion import FUSIONS
from counterpoint.types import CONTROL_KINDS, UserError

MOST = 100
"""Jobs that a listing has."""
_EVERY = 0.2
"""Seconds between looks at a job whose events are heard."""
_PING = 15.0
"""Seconds of silence after which a listener is told that it is heard: proxies close what says nothing."""
_ID = re.compile("[0-9a-f]{32}")
_PNG: dict[str, Any] = {"description": "A picture.", "content": {"image/png": {}}}
_EVENTS: dict[str, Any] = {"description": "Server-sent events.", "content": {"text/event-stream": {}}}
_CROWDED: dict[str, Any] = {"model": Problem, "description": "The queue is full; see Retry-After."}
_BEARER = HTTPBearer(auto_error=False, description="An API key.")
router = APIRouter()


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """What else may be answered, beside what every request that needs a key may be; 503 without the database."""
    return {code: {"model": Problem} for code in (401, *codes, 503)}


async def _service(request: Request) -> Service:
    return request.app.state.service


There = Annotated[Service, Depends(_service)]


async def _user(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> str:
    """Who asks, as the key that was looked at before the body was read says; the credentials are for /docs."""
    return request.state.owner


User = Annotated[str, Depends(_user)]


@router.post(
    "/v1/jobs",
    status_code=202,
    response_model=Accepted,
    tags=["jobs"],
    responses={**_problems(413, 415, 422, 507), 429: _CROWDED},
)
async def submit(job: JobIn, owner: User, service: There) -> Accepted:
    """Queue a job. What it will cost is estimated, and held against the limits, before any work."""
    return await anyio.to_thread.run_sync(_submit, job, owner, service, limiter=service.decoders)


def _submit(job: JobIn, owner: str, service: Service) -> Accepted:
    """From what costs least to what costs most; the last look at the queue decides."""
    config, limits = service.config, service.config.limits
    job = job.model_copy(update={"model": job.model or next(iter(config.models))})
    check(job, config.models, config.sizes, limits)
    estimate = service.pace.estimate({**job.model_dump(), "model": config.models[job.model]}, limits.seconds)
    if estimate > limits.seconds:
        raise UserError(f"this would take about {estimate:.0f} seconds; a job may take {limits.seconds:g}")
    count, ahead = service.store.waiting()
    full, name = service.store.full(owner, limits.queue, limits.queue_each), secrets.token_hex(16)
    if not full:
        device = {"device": config.device, "dtype": config.dtype, "compile": config.compile}
        made = opened(job, config.models, limits, device)
        try:
            request = made.write(config.jobs / name).model_dump(mode="json")
            full = service.store.add(name, owner, request, estimate, limits.queue, limits.queue_each)
        except BaseException:
            shutil.rmtree(config.jobs / name, ignore_errors=True)
            raise
    if full:
        shutil.rmtree(config.jobs / name, ignore_errors=True)
        patience = str(max(1, math.ceil(ahead / max(count, 1))))
        raise HTTPException(429, f"{full} queue is full; try again in {patience} seconds", {"Retry-After": patience})
    service.worker.wake.set()
    return Accepted(id=name, state="queued", estimated_seconds=round(estimate, 2), waiting_seconds=round(ahead, 2))


def _found(service: Service, name: str, owner: str) -> Job:
    job = service.store.get(name, owner) if _ID.fullmatch(name) else None  # PostgreSQL refuses some characters
    if job is None:
        raise HTTPException(404, f"there is no job {name}")
    return job


@router.get("/v1/jobs", response_model=list[JobOut], tags=["jobs"], responses=_problems())
def listed(owner: User, service: There) -> list[JobOut]:
    """Your latest jobs."""
    return [_out(job) for job in service.store.of(owner, MOST)]


@router.get("/v1/jobs/{name}", response_model=JobOut, tags=["jobs"], responses=_problems(404, 422))
def status(name: str, owner: User, service: There) -> JobOut:
    """A job as it is now."""
    return _out(_found(service, name, owner))


@router.get(
    "/v1/jobs/{name}/events",
    tags=["jobs"],
    response_class=StreamingResponse,
    responses={200: _EVENTS, **_problems(404, 422)},
)
async def events(name: str, owner: User, service: There, request: Request) -> StreamingResponse:
    """A job's states and steps as server-sent events, until it ends or the service does."""
    await anyio.to_thread.run_sync(_found, service, name, owner)

    async def stream() -> AsyncIterator[str]:
        before, spoke = "", time.monotonic()
        while not (service.worker.stopping.is_set() or await request.is_disconnected()):
            job = await anyio.to_thread.run_sync(service.store.get, name, owner)
            if job is None:
                return
            now = _out(job).model_dump_json()
            if now != before:
                before, spoke = now, time.monotonic()
                yield f"event: {job.state}\ndata: {now}\n\n"
            elif time.monotonic() - spoke > _PING:
                spoke = time.monotonic()
                yield ": ping\n\n"
            if job.state in ENDED:
                return
            await anyio.sleep(_EVERY)

    unbuffered = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second is nginx's
    return StreamingResponse(stream(), media_type="text/event-stream", headers=unbuffered)


@router.get(
    "/v1/jobs/{name}/images/{number}",
    tags=["jobs"],
    response_class=FileResponse,
    responses={200: _PNG, **_problems(404, 409, 410, 422)},
)
def image(name: str, number: int, owner: User, service: There) -> FileResponse:
    """A picture of a job that is done; its recipe is inside."""
    job = _found(service, name, owner)
    if job.state != DONE:
        raise HTTPException(409, f"the job is {job.state}")
    if not 0 <= number < len(job.images or ()):
        raise HTTPException(404, f"the job has {len(job.images or ())} pictures")
    file = service.config.jobs / job.id / f"{number}.png"
    if not file.is_file():
        raise HTTPException(410, "the picture is no longer kept here")
    return FileResponse(file, media_type="image/png")


@router.delete("/v1/jobs/{name}", response_model=JobOut, tags=["jobs"], responses=_problems(404, 422))
def cancel(name: str, owner: User, service: There) -> JobOut:
    """Cancel a job, a running one within a step; of one that has ended, remove its pictures and what it was given."""
    _found(service, name, owner)
    if not service.store.cancel(name, owner) and (job := _found(service, name, owner)).state in ENDED:
        shutil.rmtree(service.config.jobs / job.id, ignore_errors=True)
        service.store.wipe(job)
    return _out(_found(service, name, owner))


@router.post(
    "/v1/extract",
    tags=["tools"],
    response_class=Response,
    responses={200: _PNG, **_problems(413, 415, 422)},
)
async def extract(wanted: ExtractIn, _: User, service: There) -> Response:
    """A condition image from a photo, by what needs no model."""
    made = await anyio.to_thread.run_sync(_extract, wanted, service.config.limits, limiter=service.decoders)
    return Response(made, media_type="image/png")


def _extract(wanted: ExtractIn, limits: Limits) -> bytes:
    kind = extractable(wanted.kind)
    made = PLAIN[kind](decode(wanted.image, "image", limits))
    file = io.BytesIO()
    PIL.Image.fromarray(made).save(file, "PNG")
    return file.getvalue()


@router.get("/v1/models", tags=["tools"], responses=_problems())
async def models(_: User, service: There) -> dict[str, Any]:
    """Models, fusion rules, kinds of control and limits of this service."""
    return {
        "models": [{"name": name, "size": service.config.sizes[name]} for name in service.config.models],
        "fusions": [{"name": rule.name, "summary": rule.summary} for rule in FUSIONS.values()],
        "controls": [{"name": kind.name, "summary": kind.summary} for kind in CONTROL_KINDS.values()],
        "limits": service.config.limits.__dict__,
    }


@router.get("/health", tags=["operation"])
def health(service: There) -> JSONResponse:
    """Whether jobs are worked on."""
    alive = service.worker.is_alive()
    free = shutil.disk_usage(service.config.folder).free
    return JSONResponse({"status": "ok" if alive else "no worker", "free_bytes": free}, 200 if alive else 503)


@router.get("/metrics", tags=["operation"], response_class=Response)
def metrics(service: There) -> Response:
    """Prometheus metrics."""
    for state, count in service.store.counts().items():
        service.states.labels(state).set(count)
    found = prometheus_client.generate_latest(service.registry)
    return Response(found, media_type=prometheus_client.CONTENT_TYPE_LATEST)


def _out(job: Job) -> JobOut:
    kept = {name: getattr(job, name) for name in JobOut.model_fields if name != "images"}
    return JobOut(**kept, images=job.images or [])
