"""The service as an application: its parts, what every request passes, and its routes."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import prometheus_client
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError, TimeoutError

from counterpoint import __version__
from counterpoint.apps.request import no_such_key
from counterpoint.apps.service.middleware import BodyLimit, Counted, Keys
from counterpoint.apps.service.pace import Pace
from counterpoint.apps.service.routes import MOST, router
from counterpoint.apps.service.safety import find_check
from counterpoint.apps.service.schema import Control, ExtractIn, JobIn
from counterpoint.apps.service.state import Config, Service
from counterpoint.apps.service.store import Job, Store
from counterpoint.apps.service.worker import Worker
from counterpoint.types import UserError

_DECODERS = 4
"""Requests that decode images at a time."""
_AWAY = (OperationalError, InterfaceError, TimeoutError)
"""What the database's library raises when it is not there; other errors are ours."""
_FULL = "the service has no room left on its disk; tell its operator"
_KEYS = sorted({*JobIn.model_fields, *Control.model_fields, *ExtractIn.model_fields})
_TOLD = 20
"""Places of a request that an answer says are wrong."""


def make_app(config: Config) -> FastAPI:
    """The service as an ASGI application; its worker starts and ends with it.

    Raises:
        UserError: the folder cannot be written, the database cannot be reached, or there is no such safety checker.
    """
    find_check(config.safety, config.checker)
    if not config.database:
        config.folder.mkdir(parents=True, exist_ok=True)
    store = Store(config.database or f"sqlite:///{config.folder / 'jobs.db'}")
    config.folder.mkdir(parents=True, exist_ok=True)
    sides = {source: config.sizes[name] for name, source in config.models.items()}
    pace, registry = Pace(sides, reversed(store.done(MOST))), prometheus_client.CollectorRegistry()
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
        "models": {source: name for name, source in config.models.items()},
    }
    worker = Worker(store, config.jobs, config.limits.seconds, settings, finished, config.keep)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(worker.stop, config.grace)
            store.close()

    app = FastAPIOffline(
        title="Counterpoint",
        version=__version__,
        description="Pictures under several controls. Jobs are queued, worked on one after the other, and kept.",
        lifespan=lifespan,
    )
    app.state.service = Service(config, store, worker, pace, registry, states, anyio.CapacityLimiter(_DECODERS))
    app.add_middleware(BodyLimit, most=config.limits.body)
    app.add_middleware(Keys, keys=config.keys)
    app.add_middleware(Counted, counter=requests)  # the last is the first that a request meets

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": _plain(" ".join(str(error).split()))}, 422)

    @app.exception_handler(SQLAlchemyError)
    async def away(_: Request, error: SQLAlchemyError) -> JSONResponse:
        if not isinstance(error, _AWAY):
            raise error
        if "disk is full" in str(error.args[0]):  # as SQLite says it
            return JSONResponse({"detail": _FULL}, 507)
        return JSONResponse({"detail": "the database does not answer; try again"}, 503, {"Retry-After": "5"})

    @app.exception_handler(OSError)
    async def unwritten(_: Request, error: OSError) -> JSONResponse:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        return JSONResponse({"detail": _FULL}, 507)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "application/json")
        if request.method == "POST" and not kind.startswith("application/json"):
            return JSONResponse({"detail": "a request is JSON: send it with Content-Type: application/json"}, 415)
        found = [
            {
                "type": one["type"],
                "loc": [_plain(part) if isinstance(part, str) else part for part in one["loc"]],
                "msg": _plain(
                    no_such_key(str(one["loc"][-1]), _KEYS) if one["type"] == "extra_forbidden" else one["msg"]
                ),
            }
            for one in error.errors()[:_TOLD]  # each is looked up among all keys
        ]
        return JSONResponse({"detail": found}, 422)  # without what was sent: it may be no JSON at all

    app.include_router(router)
    return app


def _plain(text: str) -> str:
    """What can be sent: JSON may name half a character."""
    return text.encode("utf-8", "backslashreplace").decode()
