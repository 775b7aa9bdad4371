"""The service's bounds: what is refused before it costs anything, and what is said when something is missing."""

from __future__ import annotations

import base64
import errno
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError, OperationalError

from counterpoint.apps.service import checks, routes
from counterpoint.apps.service.app import make_app
from counterpoint.apps.service.schema import Limits
from counterpoint.apps.service.state import Config
from counterpoint.apps.service.store import DONE, Store
from counterpoint.apps.service.worker import Worker
from tests.conftest import noise

KEY = "k" * 16
LIMITS = Limits(body=4_000_000, pixels=128 * 160, controls=2, steps=30, images=2, queue=6, queue_each=4, seconds=120)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A service whose worker does nothing: jobs stay queued."""
    monkeypatch.setattr(Worker, "_next", lambda self: self.wake.wait())
    config = Config(tmp_path, {"tiny": "tiny"}, {"tiny": 128}, frozenset({KEY}), limits=LIMITS, threads=1, grace=0)
    with TestClient(make_app(config), headers={"Authorization": f"Bearer {KEY}"}) as made:
        yield made


def waits(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def picture(size: tuple[int, int] = (128, 128), form: str = "PNG") -> str:
    file = io.BytesIO()
    noise(size, 50).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def submit(client: TestClient, **more: Any) -> Any:
    return client.post("/v1/jobs", json={"prompt": "a red ball", "steps": 2, **more})


@pytest.mark.enable_socket
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/extract", "/v1/nothing"])
def test_a_body_without_a_key_is_not_read(client: TestClient, path: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
             "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"",
             "headers": [(b"content-type", b"application/json"), (b"content-length", b"999")],
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}  # fmt: skip
    anyio.run(client.app, scope, receive, send)
    assert sent[0]["status"] == 401
    assert b"API key" in sent[1]["body"]


@pytest.mark.enable_socket
def test_many_small_values_are_refused_unread(client: TestClient) -> None:
    for content in ('{"a":' * 200_000, json.dumps({"prompt": "a", "subject": [""] * 100_000})):
        answer = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["detail"]) == (413, "a request may hold 20,000 values")
    began = time.monotonic()
    answer = submit(client, **{f"strenght{number}": 0 for number in range(15_000)})
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) == 20
    assert time.monotonic() - began < 10


@pytest.mark.enable_socket
def test_who_names_no_model_gets_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "_next", lambda self: self.wake.wait())
    config = Config(tmp_path, {"first": "tiny", "other": "none"}, {"first": 128, "other": 1}, threads=1, grace=0)
    with TestClient(make_app(config)) as client:
        name = submit(client).json()["id"]
        assert client.app.state.service.store.get(name, "everybody").request["model"] == "tiny"


@pytest.mark.enable_socket
def test_an_icon_is_refused_undecoded(client: TestClient) -> None:
    """Pillow would decode it to say how large it is."""
    icon = picture((256, 256), "ICO")
    for answer in (submit(client, init_image=icon), client.post("/v1/extract", json={"kind": "canny", "image": icon})):
        assert answer.status_code == 422
        assert "is not an image that can be read" in answer.json()["detail"]


@pytest.mark.enable_socket
def test_images_are_decoded_last(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a full queue nor a job that takes too long costs more than a look."""
    decoded: list[str] = []
    monkeypatch.setattr(checks, "decode", lambda _, name, __: decoded.append(name) or np.zeros((8, 8, 3), np.uint8))
    service = client.app.state.service
    assert submit(client, init_image="").status_code == 202
    assert decoded == ["start"]
    service.pace.learnt["tiny", "exact"] = (1000.0, 0.001)
    answer = submit(client, init_image="")
    assert (answer.status_code, "this would take about" in answer.text) == (422, True)
    service.pace.learnt.clear()
    for number in range(LIMITS.queue_each):
        service.store.add(f"{number}", f"{number}", {}, 1.0)
    service.store.add("last", "another", {}, 1.0)
    answer = submit(client, init_image="")
    assert (answer.status_code, "the queue is full" in answer.text) == (429, True)
    assert decoded == ["start"]


@pytest.mark.enable_socket
def test_few_requests_decode_at_a_time_and_others_are_answered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    for place in (routes, checks):
        monkeypatch.setattr(place, "decode", lambda *_: go.wait(60) and np.zeros((8, 8, 3), np.uint8))
    limiter = client.app.state.service.decoders
    answers: list[Any] = []

    def ask(number: int) -> None:
        photo = {"kind": "canny", "image": ""}
        answers.append(client.post("/v1/extract", json=photo) if number else submit(client, init_image=""))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    waits(lambda: (limiter.borrowed_tokens, limiter.statistics().tasks_waiting) == (4, 2))
    assert client.get("/v1/jobs").status_code == 200
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(one.status_code for one in answers) == [200] * 5 + [202]


@pytest.mark.enable_socket
def test_whatever_is_answered_is_counted(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(client.app.state.service.store, "of", broken)
    with pytest.raises(ZeroDivisionError):
        client.get("/v1/jobs")
    client.get("/v1/jobs", headers={"Authorization": ""})
    client.post("/v1/jobs", content=b"a" * (LIMITS.body + 1))
    counted = client.get("/metrics").text
    for route, status in (("/v1/jobs", 500), ("none", 401), ("none", 413)):
        assert f'counterpoint_requests_total{{route="{route}",status="{status}"}} 1.0' in counted


@pytest.mark.enable_socket
def test_a_picture_that_its_owner_removed_is_gone(client: TestClient) -> None:
    name = submit(client, init_image=picture()).json()["id"]
    service = client.app.state.service
    folder, store = service.config.jobs / name, service.store
    assert store.end(store.claim(), DONE, images=[{"seed": 0}])
    (folder / "0.png").write_bytes(b"a picture")
    assert client.get(f"/v1/jobs/{name}/images/0").content == b"a picture"
    for _ in range(2):
        answer = client.delete(f"/v1/jobs/{name}")
        assert (answer.status_code, answer.json()["state"]) == (200, "done")
        assert not folder.exists()
    answer = client.get(f"/v1/jobs/{name}/images/0")
    assert (answer.status_code, answer.json()["detail"]) == (410, "the picture is no longer kept here")


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OperationalError("", {}, Exception("server closed the connection")), 503),
        (OperationalError("", {}, Exception("database or disk is full")), 507),
        (OSError(errno.ENOSPC, "No space left on device"), 507),
        (OSError(errno.EACCES, "Permission denied"), 500),
        (IntegrityError("", {}, Exception("twice")), 500),
    ],
)
def test_what_is_missing_is_said(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """A disk that is full, or a database that is away; other errors are ours."""

    def missing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(client.app.state.service.store, "add", missing)
    if status == 500:
        with pytest.raises(type(error)):
            submit(client)
        return
    answer = submit(client)
    assert (answer.status_code, type(answer.json()["detail"])) == (status, str)
    assert not any(client.app.state.service.config.jobs.iterdir())


def test_connections_that_died_are_noticed(tmp_path: Path) -> None:
    """A database that was restarted costs nobody an error."""
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    asked: list[None] = []
    store.engine.dialect.do_ping = lambda _: bool(asked.append(None)) or True
    store.counts()
    store.counts()
    assert asked
    store.close()


@pytest.mark.enable_socket
def test_who_listens_to_a_job_that_waits_hears_something(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_PING", 0.0)
    name = submit(client).json()["id"]
    store = client.app.state.service.store
    looked, get = count(), store.get

    def cancelled(*wanted: str) -> Any:
        if next(looked) == 3:
            store.cancel(*wanted)
        return get(*wanted)

    monkeypatch.setattr(store, "get", cancelled)
    heard = client.get(f"/v1/jobs/{name}/events")
    assert heard.headers["x-accel-buffering"] == "no", "or a proxy would keep it to itself"
    said = heard.text.split("\n\n")
    assert [one.partition("\n")[0] for one in said] == ["event: queued", ": ping", "event: cancelled", ""]
