"""What is timed of the service: its answers to many clients at once, while its queue is full and pictures are made."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from counterpoint.api import DTYPES
from counterpoint.apps.benchmark_models import SHIPPED
from counterpoint.types import UserError

CLIENTS = 16
ROUNDS = 40
"""How often each client asks everything: enough for a 99th percentile."""
ALL = "all"
_PAUSE = 0.1
"""Seconds, on average, between an answer and the same client's next request: without, the clients would only measure
how many requests the service can answer at all."""
_CANCELLED = 0.1
"""Of the jobs."""


def serve_rows(
    size: str, device: torch.device, dtype: torch.dtype, rounds: int, listen: Callable[[int, int], None] | None = None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A row for each kind of request: how many there were, and seconds at the median and the 99th percentile, from
    the first byte sent to the last byte read; and the service's jobs by state when the last one was answered.

    Raises:
        UserError: another size than tiny, or the service does not start, or answers what it should not.
    """
    if size != SHIPPED:
        raise UserError("benchmark serve makes whole pictures: --size tiny")
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(CLIENTS) as pool:
        keys = [f"{number:016}" for number in range(CLIENTS)]
        with _service(Path(folder), keys, str(device), name) as address:
            clients = [_Client(address, key) for key in keys]
            list(pool.map(_Client.prepare, clients))
            list(pool.map(lambda one: one.load(rounds, listen if one is clients[0] else None), clients))
            told = clients[0]._ask("GET", "/metrics").decode()
    timed: dict[str, list[float]] = {ALL: []}
    for request, seconds in (one for client in clients for one in client.timed):
        timed[ALL].append(seconds)
        timed.setdefault(request, []).append(seconds)
    rows = [
        {"name": request, "requests": len(seconds), "p50": _quantile(seconds, 0.5), "p99": _quantile(seconds, 0.99)}
        for request, seconds in timed.items()
    ]
    return rows, {state: int(float(n)) for state, n in re.findall(r'counterpoint_jobs\{state="(\w+)"\} (\S+)', told)}


def _quantile(seconds: list[float], share: float) -> float:
    return float(torch.tensor(seconds, dtype=torch.float64).quantile(share))


@contextmanager
def _service(folder: Path, keys: list[str], device: str, dtype: str) -> Iterator[str]:
    """``counterpoint serve`` in a process of its own; its address."""
    said, known = folder / "said.txt", folder / "keys.txt"
    known.write_text("\n".join(keys))
    command = [sys.executable, "-m", "counterpoint", "serve", "--port", "0", "--folder", folder / "service", "--keys",
               known, "--grace", "0", "--device", device, "--dtype", dtype]  # fmt: skip
    with said.open("w") as heard:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=heard)
    try:
        while not (found := re.search(r"listening on http://(\S+),", said.read_text())):
            if process.poll() is not None:
                raise UserError(said.read_text().strip().rpartition("\n")[2].removeprefix("error: "))
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


class _Client:
    """Asks one thing after the other.

    Args:
        address: of the service.
        key: its own.
    """

    def __init__(self, address: str, key: str) -> None:
        self.link = http.client.HTTPConnection(address, timeout=600)
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.draw = random.Random(key)
        self.timed: list[tuple[str, float]] = []
        self.done = self.gone = ""

    def prepare(self) -> None:
        """A job that is done and one that is cancelled, to be looked at later."""
        self.done, self.gone = (json.loads(self._ask("POST", "/v1/jobs", _job(2), 202))["id"] for _ in range(2))
        self._ask("DELETE", f"/v1/jobs/{self.gone}")
        self._ask("GET", f"/v1/jobs/{self.done}/events")
        self._ask("GET", f"/v1/jobs/{self.done}/images/0")

    def load(self, rounds: int, listen: Callable[[int, int], None] | None) -> None:
        """Everything that is answered without a picture being made; one job in ten is cancelled."""
        self.link.close()  # who waited for the others may have been hung up on; the next request opens it again
        for number in range(rounds):
            for request in self.draw.sample(_REQUESTS, len(_REQUESTS)):  # else all would ask the same at once
                time.sleep(self.draw.uniform(0, 2 * _PAUSE))
                method, path, body, *wanted = request
                began = time.perf_counter()
                content = self._ask(method, path.format(done=self.done, gone=self.gone), body, *wanted)
                self.timed.append((_called(request), time.perf_counter() - began))
                if 202 in wanted and self.draw.random() < _CANCELLED:
                    self.gone = json.loads(content).get("id", self.gone)
            if listen is not None:
                listen(number + 1, rounds)

    def _ask(self, method: str, path: str, body: Any = None, *wanted: int) -> bytes:
        self.link.request(method, path, body and json.dumps(body), self.headers)
        answer = self.link.getresponse()
        content = answer.read()
        if answer.status not in (wanted or (200,)):
            raise UserError(f"{method} {path} was answered with {answer.status}: {content[:200]!r}")
        return content


def _called(request: tuple[Any, ...]) -> str:
    method, path, _, *wanted = request
    return f"{method} {path.format(done='ID', gone='ID')}{', malformed' if 422 in wanted else ''}"


def _photo() -> str:
    file = io.BytesIO()
    PIL.Image.linear_gradient("L").convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _job(steps: int) -> dict[str, Any]:
    return {"prompt": "a red ball on a meadow", "steps": steps}


_REQUESTS: list[tuple[Any, ...]] = [
    ("POST", "/v1/jobs", _job(20), 202, 429),
    ("POST", "/v1/jobs", _job(-1), 422),
    ("POST", "/v1/extract", {"kind": "canny", "image": _photo()}),
    ("DELETE", "/v1/jobs/{gone}", None),
    *(
        ("GET", path, None)
        for path in ("/v1/jobs", "/v1/jobs/{done}", "/v1/jobs/{done}/events", "/v1/jobs/{done}/images/0",
                     "/v1/models", "/health", "/metrics")
    ),
]  # fmt: skip
"""Method, path, body, and which statuses are right beside 200: whatever is answered without a picture being made."""
