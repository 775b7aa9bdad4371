"""The service under load: every accepted job ends exactly once. How fast it answers: `counterpoint benchmark serve`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.prove, pytest.mark.enable_socket]
CLIENTS, JOBS = 16, 200
KEYS = [f"{number:x}" * 16 for number in range(CLIENTS)]


class Server:
    """``counterpoint serve`` as a process of its own."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.database = folder, database
        (folder / "keys.txt").write_text("\n".join(KEYS))
        self.start()

    def start(self) -> None:
        """Until it listens."""
        command = [sys.executable, "-m", "counterpoint", "serve", "--port", "0", "--folder", str(self.folder / "jobs"),
                   "--keys", str(self.folder / "keys.txt"), "--database", self.database, "--grace", "1"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("listening on "):
                self.url = line.split()[2].rstrip(",")
                break
        self.rest = threading.Thread(target=self.process.stderr.read, daemon=True)
        self.rest.start()

    def stop(self, how: int = signal.SIGTERM) -> None:
        """And wait."""
        self.process.send_signal(how)
        self.process.wait(60)
        self.rest.join(10)
        self.process.stderr.close()

    def workers(self) -> list[int]:
        """Processes that carry jobs out."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if parent == self.process.pid and "spawn_main" in command:
                found.append(int(entry.name))
        return found


@pytest.fixture
def server(tmp_path: Path, database: str) -> Iterator[Server]:
    made = Server(tmp_path, database)
    yield made
    if not made.process.stderr.closed:
        made.stop(signal.SIGKILL)


def client(server: Server, number: int) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEYS[number]}"}, timeout=60)


def ask(server: Server, number: int, jobs: int, accepted: dict[str, tuple[int, bool]], lock: threading.Lock) -> None:
    draw = random.Random(number)
    with client(server, number) as mine:
        for job in range(jobs):
            if draw.random() < 0.05:
                assert mine.post("/v1/jobs", json={"prompt": "a", "steps": -1}).status_code == 422
                continue
            while (
                answer := mine.post("/v1/jobs", json={"prompt": "a red ball", "steps": 2, "seed": job})
            ).status_code == 429:
                time.sleep(min(float(answer.headers["Retry-After"]), 1))
            assert answer.status_code == 202, answer.text
            name, cancel = answer.json()["id"], draw.random() < 0.1
            with lock:
                accepted[name] = (number, cancel)
            if cancel:
                assert mine.delete(f"/v1/jobs/{name}").status_code == 200


def test_two_hundred_jobs_of_sixteen_clients(server: Server) -> None:
    accepted: dict[str, tuple[int, bool]] = {}
    lock = threading.Lock()
    share = [JOBS // CLIENTS + (number < JOBS % CLIENTS) for number in range(CLIENTS)]
    threads = [
        threading.Thread(target=ask, args=(server, number, share[number], accepted, lock)) for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while not server.workers() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(4)
    (killed,) = server.workers()
    os.kill(killed, signal.SIGKILL)
    for thread in threads:
        thread.join()
    clients = [client(server, number) for number in range(CLIENTS)]
    ended: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + 600
    while len(ended) < len(accepted) and time.monotonic() < until:
        for name, (number, _) in accepted.items():
            if name not in ended:
                job = clients[number].get(f"/v1/jobs/{name}").json()
                if job["state"] in {"done", "cancelled", "failed"}:
                    ended[name] = job
        time.sleep(0.2)
    assert set(ended) == set(accepted)
    assert 0.85 * JOBS < len(accepted) < JOBS, "some were malformed"
    (again,) = server.workers()
    assert again != killed
    assert {"done", "cancelled"} <= {job["state"] for job in ended.values()}
    for name, job in ended.items():
        number, cancel = accepted[name]
        assert job["state"] == "done" or (cancel and job["state"] == "cancelled"), job
        assert clients[number].get(f"/v1/jobs/{name}").json() == job, "an end is final"
        if job["state"] == "done" and not cancel:  # whoever cancels too late removes the picture
            assert clients[number].get(f"/v1/jobs/{name}/images/0").headers["content-type"] == "image/png"
    for number, mine in enumerate(clients):
        listed = [one["id"] for one in mine.get("/v1/jobs").json()]
        assert len(listed) == len(set(listed))
        assert set(listed) == {name for name, (owner, _) in accepted.items() if owner == number}
        mine.close()


def test_jobs_survive_a_restart(server: Server) -> None:
    with client(server, 0) as mine:
        names = [mine.post("/v1/jobs", json={"prompt": "a", "steps": 20, "n": 4}).json()["id"] for _ in range(4)]
    for how in (signal.SIGTERM, signal.SIGKILL):
        time.sleep(6)
        server.stop(how)
        server.start()
    with client(server, 0) as mine:
        until = time.monotonic() + 300
        states: list[str] = []
        while time.monotonic() < until:
            states = [mine.get(f"/v1/jobs/{name}").json()["state"] for name in names]
            if set(states) == {"done"}:
                break
            time.sleep(0.5)
        assert states == ["done"] * 4


def test_replicas_on_ray_share_the_jobs(tmp_path: Path) -> None:
    """Two replicas; whichever answers, every job is found, worked on once, and its picture is there."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "counterpoint", "serve", "--port", "0", "--folder", str(tmp_path), "--ray",
               "local", "--replicas", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    heard: list[str] = []
    for line in process.stderr:
        heard.append(line)
        if line.startswith("listening on "):
            break
    assert heard[-1].startswith("listening on "), heard[-20:]
    url = heard[-1].split()[2].rstrip(",")
    rest = threading.Thread(target=process.stderr.read, daemon=True)
    rest.start()
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            names = [
                client.post("/v1/jobs", json={"prompt": "a red ball", "steps": 2, "seed": seed}).json()["id"]
                for seed in range(8)
            ]
            assert len(set(names)) == 8
            deadline = time.monotonic() + 600
            while time.monotonic() < deadline:
                states = [client.get(f"/v1/jobs/{name}").json()["state"] for name in names]
                if set(states) == {"done"}:
                    break
                time.sleep(0.3)
            assert set(states) == {"done"}
            for name in names:
                assert client.get(f"/v1/jobs/{name}/images/0").content.startswith(b"\x89PNG")
            cancelled = client.post("/v1/jobs", json={"prompt": "a red ball", "steps": 150}).json()["id"]
            client.delete(f"/v1/jobs/{cancelled}")
            with client.stream("GET", f"/v1/jobs/{cancelled}/events") as events:
                assert "event: cancelled" in events.read().decode()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        rest.join(10)
        process.stderr.close()
    assert process.returncode == 0
