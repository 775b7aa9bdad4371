"""The service's worker and server: how they end, who owns a job, and what a process outlives."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from counterpoint.apps.service.app import make_app
from counterpoint.apps.service.server import Server
from counterpoint.apps.service.state import Config
from counterpoint.apps.service.worker import Worker


def waits(until: Callable[[], bool], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.enable_socket
def test_who_listens_to_events_keeps_no_server_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is another job claimed."""
    monkeypatch.setattr(Worker, "_next", lambda self: self.wake.wait())
    app = make_app(Config(tmp_path, {"tiny": "tiny"}, {"tiny": 128}, grace=600, threads=1))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        server, url = Server(app), f"http://127.0.0.1:{probe.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [probe]}, daemon=True)
        thread.start()
        app.state.service.store.add("0" * 32, "everybody", {"model": "tiny"}, 1.0)
        with httpx.stream("GET", f"{url}/v1/jobs/{'0' * 32}/events", timeout=60) as events:
            lines = events.iter_lines()
            assert next(lines) == "event: queued"
            server.should_exit = True
            assert list(lines)[-1] == ""
        thread.join(60)
    assert not thread.is_alive()
    assert not app.state.service.worker.is_alive()
