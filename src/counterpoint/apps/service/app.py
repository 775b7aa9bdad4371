"""The API itself."""

from __future__ import annotations

import hashlib
import hmac
import io
import math
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import PIL.Image
import prometheus_client
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from counterpoint import __version__
from counterpoint.apps.service.pace import Pace
from counterpoint.apps.service.safety import Check, find_check
from counterpoint.apps.service.schema import (
    Accepted,
    ExtractIn,
    JobIn,
    JobOut,
    Limits,
    check,
    decode,
    extractable,
)
from counterpoint.apps.service.store import DONE, ENDED, Job, Store
from counterpoint.apps.service.worker import Worker
from counterpoint.conditions.plain import PLAIN
from counterpoint.types import CONTROL_KINDS, UserError

_EVERY = 0.2
"""Seconds between looks at a job whose events are heard."""
_MOST = 100
"""Jobs that a listing has."""


_BEARER = HTTPBearer(auto_error=False, description="An API key.")


def _user(request: Request, key: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> str:
    """Who asks: one for each key, whose hash it is; without keys everybody is one."""
    keys = request.app.state.keys
    if not keys:
        return "everybody"
    given = "" if key is None else key.credentials
    if not sum(hmac.compare_digest(given.encode(), known.encode()) for known in keys):
        said = "this service wants an API key: Authorization: Bearer KEY"
        raise HTTPException(401, said, {"WWW-Authenticate": "Bearer"})
    return hashlib.sha256(given.encode()).hexdigest()[:32]


User = Annotated[str, Depends(_user)]


@dataclass(frozen=True)
class Config:
    """How the service runs.

    Attributes:
        folder: where jobs, their pictures and the database are.
        models: name -> what :func:`counterpoint.load` takes.
        sizes: model -> side of its pictures.
        keys: API keys; without any, everybody is one user.
        database: URL; default SQLite in ``folder``.
        limits: of requests.
        device: where models run.
        dtype: of models.
        safety: an action of :mod:`counterpoint.apps.service.safety`.
        checker: folder of diffusers' safety checker, ``MODULE:FUNCTION``, or a function of a module.
        grace: seconds that the job at hand may take when the service ends.
        threads: of the worker.
    """

    folder: Path
    models: Mapping[str, str]
    sizes: Mapping[str, int]
    keys: frozenset[str] = frozenset()
    database: str = ""
    limits: Limits = field(default_factory=Limits)
    device: str = "cpu"
    dtype: str = "fp32"
    safety: str = "off"
    checker: str | Path | Check | None = None
    grace: float = 30.0
    threads: int = 2


class BodyLimit:
    """Refuses bodies that are too large before they are read whole."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what comes in."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self.most:
            await self._refuse(scope, receive, send)
            return
        seen = 0
        body: list[Message] = []
        while True:
            message = await receive()
            body.append(message)
            seen += len(message.get("body", b""))
            if seen > self.most:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body"):
                break

        async def replay() -> Message:
            return body.pop(0) if body else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = JSONResponse({"detail": f"a request may have {self.most:,} bytes"}, 413, {"Connection": "close"})
        await answer(scope, receive, send)


class Counted:
    """Counts requests by route and status."""

    def __init__(self, app: ASGIApp, counter: prometheus_client.Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the answer's first message."""

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self.counter.labels(route, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, seen if scope["type"] == "http" else send)


def make_app(config: Config) -> FastAPI:
    """The service as an ASGI application; its worker starts and ends with it.

    Raises:
        UserError: the folder cannot be written, the database cannot be reached, or there is no such safety checker.
    """
    find_check(config.safety, config.checker)
    config.folder.mkdir(parents=True, exist_ok=True)
    jobs_folder = config.folder / "jobs"
    store = Store(config.database or f"sqlite:///{config.folder / 'jobs.db'}")
    sides = {source: config.sizes[name] for name, source in config.models.items()}
    pace, registry = Pace(sides, reversed(store.done(_MOST))), prometheus_client.CollectorRegistry()
    requests = prometheus_client.Counter(
        "counterpoint_requests", "Requests by route and status", ["route", "status"], registry=registry
    )
    seconds = prometheus_client.Histogram(
        "counterpoint_job_seconds", "Seconds of jobs that are done", registry=registry
    )
    states = prometheus_client.Gauge("counterpoint_jobs", "Jobs by state", ["state"], registry=registry)

    def finished(job: Job, took: float) -> None:
        pace.learn(job)
        seconds.observe(took)

    settings = {
        "safety": config.safety,
        "checker": config.checker,
        "threads": config.threads,
        "models": frozenset(sides),
    }
    worker = Worker(store, jobs_folder, config.limits.seconds, settings, finished)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(worker.stop, config.grace)

    app = FastAPIOffline(
        title="Counterpoint",
        version=__version__,
        description="Pictures under several controls. Jobs are queued, worked on one after the other, and kept.",
        lifespan=lifespan,
    )
    app.state.store, app.state.worker, app.state.keys = store, worker, config.keys
    app.add_middleware(Counted, counter=requests)
    app.add_middleware(BodyLimit, most=config.limits.body)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": _plain(" ".join(str(error).split()))}, 422)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        found = [
            {
                "type": one["type"],
                "loc": [_plain(part) if isinstance(part, str) else part for part in one["loc"]],
                "msg": _plain(one["msg"]),
            }
            for one in error.errors()
        ]
        return JSONResponse({"detail": found}, 422)  # without what was sent: it may be no JSON at all

    crowded = {"description": "The queue is full; see Retry-After."}

    @app.post(
        "/v1/jobs",
        status_code=202,
        response_model=Accepted,
        tags=["jobs"],
        responses={401: {}, 413: {}, 422: {}, 429: crowded},
    )
    def submit(job: JobIn, owner: User) -> Accepted:
        """Queue a job. What it will cost is estimated, and held against the limits, before any work."""
        device = {"device": config.device, "dtype": config.dtype}
        checked = check(job, config.models, config.sizes, config.limits, device)
        estimate = pace.estimate(checked.request.model_dump(), config.limits.seconds)
        if estimate > config.limits.seconds:
            raise UserError(f"this would take about {estimate:.0f} seconds; a job may take {config.limits.seconds:g}")
        count, ahead = store.waiting()
        name = secrets.token_hex(16)
        try:
            request = checked.write(jobs_folder / name).model_dump(mode="json")
            full = store.add(name, owner, request, estimate, config.limits.queue, config.limits.queue_each)
        except BaseException:
            shutil.rmtree(jobs_folder / name, ignore_errors=True)
            raise
        if full:
            shutil.rmtree(jobs_folder / name, ignore_errors=True)
            patience = str(max(1, math.ceil(ahead / max(count, 1))))
            raise HTTPException(
                429, f"{full} queue is full; try again in {patience} seconds", {"Retry-After": patience}
            )
        worker.wake.set()
        return Accepted(id=name, state="queued", estimated_seconds=round(estimate, 2), waiting_seconds=round(ahead, 2))

    def found(name: str, owner: str) -> Job:
        job = store.get(name, owner)
        if job is None:
            raise HTTPException(404, f"there is no job {name}")
        return job

    @app.get("/v1/jobs", response_model=list[JobOut], tags=["jobs"])
    def listed(owner: User) -> list[JobOut]:
        """Your latest jobs."""
        return [_out(job) for job in store.of(owner, _MOST)]

    @app.get("/v1/jobs/{name}", response_model=JobOut, tags=["jobs"], responses={404: {}})
    def status(name: str, owner: User) -> JobOut:
        """A job as it is now."""
        return _out(found(name, owner))

    @app.get("/v1/jobs/{name}/events", tags=["jobs"], responses={404: {}, 200: {"content": {"text/event-stream": {}}}})
    async def events(name: str, owner: User, request: Request) -> StreamingResponse:
        """A job's states and steps as server-sent events, until it ends."""
        await anyio.to_thread.run_sync(found, name, owner)

        async def stream() -> AsyncIterator[str]:
            before = ""
            while not await request.is_disconnected():
                job = await anyio.to_thread.run_sync(store.get, name, owner)
                if job is None:
                    return
                now = _out(job).model_dump_json()
                if now != before:
                    before = now
                    yield f"event: {job.state}\ndata: {now}\n\n"
                if job.state in ENDED:
                    return
                await anyio.sleep(_EVERY)

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get(
        "/v1/jobs/{name}/images/{number}", tags=["jobs"], response_class=FileResponse, responses={404: {}, 409: {}}
    )
    def image(name: str, number: int, owner: User) -> FileResponse:
        """A picture of a job that is done; its recipe is inside."""
        job = found(name, owner)
        if job.state != DONE:
            raise HTTPException(409, f"the job is {job.state}")
        if not 0 <= number < len(job.images or ()):
            raise HTTPException(404, f"the job has {len(job.images or ())} pictures")
        return FileResponse(jobs_folder / job.id / f"{number}.png", media_type="image/png")

    @app.delete("/v1/jobs/{name}", response_model=JobOut, tags=["jobs"], responses={404: {}, 409: {}})
    def cancel(name: str, owner: User) -> JobOut:
        """Cancel a job that has not ended; a running one stops within a step."""
        found(name, owner)
        if not store.cancel(name, owner):
            raise HTTPException(409, "the job has ended")
        return _out(found(name, owner))

    @app.post("/v1/extract", tags=["tools"], response_class=Response,
              responses={200: {"content": {"image/png": {}}}, 401: {}, 413: {}, 422: {}})  # fmt: skip
    def extract(wanted: ExtractIn, _: User) -> Response:
        """A condition image from a photo, by what needs no model."""
        kind = extractable(wanted.kind)
        made = PLAIN[kind](decode(wanted.image, "image", config.limits))
        file = io.BytesIO()
        PIL.Image.fromarray(made).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    @app.get("/v1/models", tags=["tools"])
    def models(_: User) -> dict[str, Any]:
        """Models, fusion rules, kinds of control and limits of this service."""
        from counterpoint.fusion import FUSIONS

        return {
            "models": [{"name": name, "size": config.sizes[name]} for name in config.models],
            "fusions": [{"name": rule.name, "summary": rule.summary} for rule in FUSIONS.values()],
            "controls": [{"name": kind.name, "summary": kind.summary} for kind in CONTROL_KINDS.values()],
            "limits": config.limits.__dict__,
        }

    @app.get("/health", tags=["operation"])
    def health() -> JSONResponse:
        """Whether jobs are worked on."""
        alive = worker.is_alive()
        free = shutil.disk_usage(config.folder).free
        return JSONResponse({"status": "ok" if alive else "no worker", "free_bytes": free}, 200 if alive else 503)

    @app.get("/metrics", tags=["operation"], response_class=Response)
    def metrics() -> Response:
        """Prometheus metrics."""
        for state, count in store.counts().items():
            states.labels(state).set(count)
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


def _plain(text: str) -> str:
    """What can be sent: JSON may name half a character."""
    return text.encode("utf-8", "backslashreplace").decode()


def _out(job: Job) -> JobOut:
    kept = {name: getattr(job, name) for name in JobOut.model_fields if name != "images"}
    return JobOut(**kept, images=job.images or [])
