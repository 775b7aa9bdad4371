"""What every request passes before its route: its key, and the size of its body."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Set

import prometheus_client
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_VALUES = 20_000
"""Numbers, texts, lists and objects of a request: many times what its schema can hold. A text of any length is read at
once, but many small values keep everybody waiting."""


def _asks(scope: Scope) -> bool:
    """Whether this is a request of the API, which needs a key."""
    return scope["type"] == "http" and scope["path"].startswith("/v1/")


class Keys:
    """Refuses whoever has no key, before the body is read, and says who asks: ``owner`` of the request's state.

    Args:
        app: what is asked next.
        keys: without any, everybody is one.
    """

    def __init__(self, app: ASGIApp, keys: Set[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the key of what needs one."""
        if _asks(scope):
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            given = key.strip().encode() if kind.lower() == "bearer" else b""
            if self.keys and not sum(hmac.compare_digest(given, known) for known in self.keys):
                said = "this service wants an API key: Authorization: Bearer KEY"
                await JSONResponse({"detail": said}, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
            owner = hashlib.sha256(given).hexdigest()[:32] if self.keys else "everybody"
            scope.setdefault("state", {})["owner"] = owner
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large before they are read whole, and those of too many values before anything else
    reads them."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what comes in; nothing else than the API reads a body."""
        if not _asks(scope):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self.most:
            await self._refuse(scope, receive, send)
            return
        seen = values = 0
        body: list[Message] = []
        while True:
            message = await receive()
            body.append(message)
            part = message.get("body", b"")
            seen += len(part)
            values += sum(map(part.count, (b",", b"[", b"{")))
            if seen > self.most:
                await self._refuse(scope, receive, send)
                return
            if values > _VALUES:
                await self._refuse(scope, receive, send, f"a request may hold {_VALUES:,} values")
                return
            if not message.get("more_body"):
                break

        async def replay() -> Message:
            return body.pop(0) if body else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, said: str = "") -> None:
        answer = {"detail": said or f"a request may have {self.most:,} bytes"}
        await JSONResponse(answer, 413, {"Connection": "close"})(scope, receive, send)


class Counted:
    """Counts requests by route and status, also those that no route sees and those that end in an exception."""

    def __init__(self, app: ASGIApp, counter: prometheus_client.Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at the answer's first message."""
        begun = False

        def count(status: int) -> None:
            nonlocal begun
            begun = True
            self.counter.labels(getattr(scope.get("route"), "path", "none"), status).inc()

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, seen if scope["type"] == "http" else send)
        except Exception:
            if scope["type"] == "http" and not begun:
                count(500)
            raise
