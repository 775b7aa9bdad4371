"""How the service is set up, and what its routes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import prometheus_client

from counterpoint.apps.service.pace import Pace
from counterpoint.apps.service.safety import Check
from counterpoint.apps.service.schema import Limits
from counterpoint.apps.service.store import Store
from counterpoint.apps.service.worker import Worker


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
        compile: whether torch compiles their networks.
        safety: an action of :mod:`counterpoint.apps.service.safety`.
        checker: folder of diffusers' safety checker, ``MODULE:FUNCTION``, or a function of a module.
        grace: seconds that the job at hand may take when the service ends.
        threads: of the worker.
        keep: days after which a job that has ended is removed with its pictures; without, none is.
    """

    folder: Path
    models: Mapping[str, str]
    sizes: Mapping[str, int]
    keys: frozenset[str] = frozenset()
    database: str = ""
    limits: Limits = field(default_factory=Limits)
    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    safety: str = "off"
    checker: str | Path | Check | None = None
    grace: float = 30.0
    threads: int = 2
    keep: float | None = None

    @property
    def jobs(self) -> Path:
        """The folder of what jobs were given and made, one each."""
        return self.folder / "jobs"


@dataclass(frozen=True)
class Service:
    """What is there once for all requests: the jobs, what works on them, how long they take, what is counted, and how
    many requests decode images at a time, each in hundreds of megabytes."""

    config: Config
    store: Store
    worker: Worker
    pace: Pace
    registry: prometheus_client.CollectorRegistry
    states: prometheus_client.Gauge
    decoders: anyio.CapacityLimiter
