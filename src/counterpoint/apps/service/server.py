"""The service's HTTP server, which ends politely."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from counterpoint.apps.service.state import Service

_CONNECTIONS = 256
"""At a time, listeners to events among them; who comes then is told 503, before anything of the request is kept."""
_REST = 5
"""Seconds for requests at hand when the server ends, beyond those of the job at hand."""


class Server(uvicorn.Server):
    """Uvicorn's, which waits for open requests before it tells the application to end: listeners of events would be
    waited for, and jobs be claimed until then.

    Args:
        app: the service.
    """

    def __init__(self, app: FastAPI) -> None:
        self.service: Service = app.state.service
        grace = int(self.service.config.grace) + _REST
        super().__init__(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace, limit_concurrency=_CONNECTIONS)
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Claim no more jobs and end streams of events, before all else."""
        self.service.worker.close(self.service.config.grace)
        await super().shutdown(sockets)
