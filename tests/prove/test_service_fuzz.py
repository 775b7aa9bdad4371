"""Every route that the service itself describes, asked for nonsense: nothing malformed is an internal error."""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from counterpoint.apps.service.app import make_app
from counterpoint.apps.service.schema import Limits
from counterpoint.apps.service.state import Config
from counterpoint.apps.service.store import DONE
from counterpoint.apps.service.worker import Worker

pytestmark = [pytest.mark.prove, pytest.mark.enable_socket]
REQUESTS = 2000
TEXTS = [
    "", "a", "\x00\ud83d\ude00", "../../etc/passwd", "A" * 5000, "NaN", "-inf", "1e5", "\ud800", "\u202e", "%00",
    "'; --",
]  # fmt: skip
NUMBERS = [-1, 0, 1, 0.5, 10**400, 1e308, float("nan"), float("inf"), 10**4000]
OPEN = ["instances", "interactions", "phrase", "box", "subject", "object", "action", "reference", "x", "\ud800"]
"""Keys where the description leaves them open, such as a layout's."""
HEADERS = [
    {"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=utf-16"},
    {"Authorization": "Bearer \xff"}, {"Range": "bytes=9-2,x"}, {"Range": "bytes=0-0,1-1"}, {"If-Range": "x"},
    {"Last-Event-ID": "-1"}, {"Accept": "x"},
]  # fmt: skip


def junk(draw: random.Random, names: list[str], depth: int = 0) -> Any:
    """Any JSON."""
    if depth < 4 and draw.random() < 0.5:
        if draw.random() < 0.5:
            return [junk(draw, names, depth + 1) for _ in range(draw.randrange(5))]
        return {draw.choice(names): junk(draw, names, depth + 1) for _ in range(draw.randrange(4))}
    return draw.choice([None, True, *NUMBERS, *TEXTS])


def values(place: Any) -> list[Any]:
    return list(place.values()) if isinstance(place, dict) else place


def mutated(draw: random.Random, body: Any, names: list[str]) -> bytes:
    """A valid body of which some parts were replaced, added or left out, or bytes were changed."""
    body = copy.deepcopy(body)
    for _ in range(draw.randrange(4)):
        place = body
        while (
            inside := [one for one in values(place) if one and isinstance(one, (dict, list))]
        ) and draw.random() < 0.6:
            place = draw.choice(inside)
        keys = [*place, *names] if isinstance(place, dict) else range(len(place))
        place[draw.choice(keys)] = junk(draw, [*names, *OPEN])
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        place = draw.randrange(len(raw))
        raw = raw[:place] + bytes([draw.randrange(256)]) + raw[place + draw.randrange(3) :]
    return raw


def test_two_thousand_malformed_requests(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "_next", lambda self: self.wake.wait())  # no picture is made
    limits = Limits(queue=REQUESTS, queue_each=REQUESTS)
    config = Config(tmp_path, {"tiny": "tiny"}, {"tiny": 128}, database=database, limits=limits, threads=1, grace=0)
    draw, seen = random.Random(0), Counter[tuple[str, int]]()
    with TestClient(make_app(config), raise_server_exceptions=False) as service:
        done, cancelled = (service.post("/v1/jobs", json={"prompt": "a"}).json()["id"] for _ in range(2))
        store, picture = service.app.state.service.store, config.jobs / done / "0.png"
        assert store.end(store.claim(), DONE, images=[{"seed": 0}])
        assert service.delete(f"/v1/jobs/{cancelled}").json()["state"] == "cancelled"
        told = service.get("/openapi.json").json()
        models = told["components"]["schemas"]
        asked = [
            (method, path, models[body["application/json"]["schema"]["$ref"].rpartition("/")[2]] if body else {})
            for path, methods in told["paths"].items()
            for method, one in methods.items()
            for body in [one.get("requestBody", {}).get("content")]
        ]
        weights = [1 + len(model.get("properties", ())) for _, _, model in asked]
        names = sorted({name for model in models.values() for name in model.get("properties", ())})
        places = [done, cancelled, "0", *map(str, NUMBERS), *TEXTS, "f" * 32]
        for number in range(REQUESTS):
            picture.parent.mkdir(exist_ok=True)
            picture.write_bytes(b"a picture")
            method, path, model = draw.choices(asked, weights)[0]
            url = re.sub(r"\{name\}", lambda _: quote(draw.choice([done, *places]), "", errors="surrogatepass"), path)
            url = re.sub(r"\{\w+\}", lambda _: quote(draw.choice(["0", *places]), "", errors="surrogatepass"), url)
            query = f"?{draw.choice(names)}={quote(draw.choice(TEXTS), '', errors='surrogatepass')}"
            raw = mutated(draw, draw.choice(model["examples"]), [*model["properties"], "extra"]) if model else None
            headers = {"Content-Type": "application/json"} | (draw.choice(HEADERS) if draw.random() < 0.1 else {})
            answer = service.request(
                method, url + query * (draw.random() < 0.1), content=raw,
                headers={key: value.encode("latin-1") for key, value in headers.items()},
            )  # fmt: skip
            seen[f"{method} {path}", answer.status_code // 100] += 1
            assert answer.status_code < 500, (number, method, url, headers, raw and raw[:500], answer.text)
        assert service.get("/health").status_code == 200
    for method, path, _ in asked:
        assert seen[f"{method} {path}", 2], f"{method} {path} was never asked for what it has"
    assert sum(count for (_, kind), count in seen.items() if kind == 4) > REQUESTS / 2
