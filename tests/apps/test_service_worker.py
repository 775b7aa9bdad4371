"""The service's worker and server: how they end, who owns a job, and what a process outlives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from sqlalchemy.exc import OperationalError

from counterpoint.apps.service import worker as carries
from counterpoint.apps.service.app import make_app
from counterpoint.apps.service.server import Server
from counterpoint.apps.service.state import Config
from counterpoint.apps.service.store import Store
from counterpoint.apps.service.worker import Worker
from counterpoint.types import UserError

SETTINGS = {"safety": "off", "checker": None, "threads": 1, "models": {"tiny": "tiny"}}


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


def test_a_process_hears_the_service_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal or a supervisor sends its signals to the whole group."""
    heard: dict[int, object] = {}
    monkeypatch.setattr("signal.signal", heard.__setitem__)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    ours, theirs = Pipe()
    ours.close()
    carries.work(theirs, SETTINGS)
    assert heard == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}


_ABANDONED = """
import sys, time
from pathlib import Path
from counterpoint.apps.service.store import Store
from counterpoint.apps.service.worker import Worker
if __name__ == "__main__":
    store = Store(f"sqlite:///{sys.argv[1]}/jobs.db")
    store.add("a", "a", {"model": "tiny"}, 1.0)
    worker = Worker(store, Path(sys.argv[1]), 600.0, {"models": {"tiny": "tiny"}})
    worker.start()
    ignored = "0"
    while not int(ignored, 16) >> 14 & 1:  # the process hears no SIGTERM any more
        time.sleep(0.05)
        if worker.process is not None and worker.process.pid:
            ignored = Path(f"/proc/{worker.process.pid}/status").read_text().split("SigIgn:")[1].split()[0]
    print(worker.process.pid)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which signals a process ignores")
def test_a_service_that_ends_unasked_takes_its_process_along(tmp_path: Path) -> None:
    script = tmp_path / "abandoned.py"
    script.write_text(_ABANDONED)
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Worker, Any]]:
    """One whose process is this test, which has the other end of its link."""
    monkeypatch.setattr(carries, "_PAUSE", 0.01)
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    store.add("a", "a", {"model": "tiny"}, 1.0)
    made = Worker(store, tmp_path, 600.0, SETTINGS)
    ours, theirs = Pipe()
    monkeypatch.setattr(made, "_linked", lambda: theirs)
    yield made, ours
    made.stop(0)
    store.close()


def test_a_job_goes_on_while_the_database_is_away(worker: tuple[Worker, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, process = worker
    store, left = made.store, {"progress": 3, "to_cancel": 2, "end": 3}

    def now_and_then(name: str) -> Any:
        call = getattr(store, name)

        def tried(*arguments: Any) -> Any:
            left[name] -= 1
            if left[name] >= 0:
                raise OperationalError("", {}, Exception("the database is away"))
            return call(*arguments)

        return tried

    for name in left:
        monkeypatch.setattr(store, name, now_and_then(name))
    made.start()
    assert process.recv()[0] == {"model": "tiny"}
    process.send(("step", (3, 9)))
    waits(lambda: store.get("a", "a").step == 3)
    process.send(("done", [{"seed": 0}]))
    waits(lambda: store.get("a", "a").state == "done")
    assert store.get("a", "a").attempts == 1
    assert max(left.values()) < 0


def test_a_worker_leaves_a_job_that_is_anothers(worker: tuple[Worker, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, process = worker
    killed = threading.Event()
    monkeypatch.setattr(carries, "LEASE", 0.0)
    monkeypatch.setattr(made, "_kill", killed.set)
    monkeypatch.setattr(made.store, "recover", lambda: None)
    monkeypatch.setattr(made.store, "alive", lambda _: False)
    made.start()
    assert process.recv()[0] == {"model": "tiny"}
    assert killed.wait(60)
    assert made.store.get("a", "a").state == "running", "of the other"


def test_a_fault_ends_its_process_and_no_other(worker: tuple[Worker, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a CUDA error every job of the same process would fail."""
    made, process = worker
    ends: list[str] = []
    monkeypatch.setattr(made, "_kill", lambda: ends.append("killed"))
    made.start()
    for name, kind in (("a", "failed"), ("b", "cancelled"), ("c", "fault"), ("d", "done")):
        if name != "a":
            made.store.add(name, "a", {"model": "tiny"}, 1.0)
        process.recv()
        assert ends == (["killed"] if name == "d" else [])
        process.send((kind, [] if kind == "done" else "because"))
        waits(lambda name=name: made.store.get(name, "a").state not in {"queued", "running"})
    jobs = [made.store.get(name, "a") for name in "abcd"]
    assert [(job.state, job.reason) for job in jobs] == [
        ("failed", "because"), ("cancelled", "because"), ("failed", "because"), ("done", ""),
    ]  # fmt: skip


def test_faults_are_told_from_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what a job that ran out of memory had there is gone when its models are."""
    errors = [torch.OutOfMemoryError, lambda: RuntimeError("CUDA error: an assert"), lambda: UserError("no")]
    held: list[weakref.ref[torch.Tensor]] = []
    gone: list[bool] = []

    def pictures(*_: Any) -> Any:
        latents = torch.zeros(8)
        held.append(weakref.ref(latents))
        raise errors[len(held) - 1]()

    runner = carries._Runner(None, None, {})
    monkeypatch.setattr(runner, "_pictures", pictures)
    monkeypatch.setattr(runner.models, "forget", lambda: gone.append(held[-1]() is None))
    assert [runner.carry_out({}, str(tmp_path))[0] for _ in errors] == ["failed", "fault", "failed"]
    assert gone == [True]
