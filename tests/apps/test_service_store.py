"""The service's jobs in their database: who is next, at what cost, and how long they are kept."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from counterpoint.apps.service import store as jobs
from counterpoint.apps.service.store import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Store, next_job
from counterpoint.apps.service.worker import Worker

SETTINGS = {"safety": "off", "checker": None, "threads": 1, "models": {"tiny": "tiny"}}


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    with closing(Store(database)) as made:
        yield made


def fill(store: Store, names: list[str], owners: int = 16, **values: Any) -> None:
    """Jobs as if they had been, all at once."""
    row = {"state": DONE, "request": {"prompt": "a" * 300}, "estimate": 1.0}
    rows = [
        {**row, "id": name, "owner": f"{i % owners}", "created": i, "started": i, "ended": i, **values}
        for i, name in enumerate(names)
    ]
    with store.engine.begin() as connection:
        connection.execute(jobs._JOBS.insert(), rows)


def test_the_next_job_is_the_oldest_of_whoever_was_served_least_recently(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, draw = count(1), random.Random(0)
    monkeypatch.setattr(jobs.time, "time", lambda: float(next(clock)))
    waiting: list[tuple[str, str]] = []
    served: dict[str, float] = {}
    claims = 0
    for number in range(80):
        if draw.random() < 0.6:
            waiting.append((owner := draw.choice("abcde"), f"{number}"))
            store.add(f"{number}", owner, {}, 1.0)
            continue
        job, wanted = store.claim(), min(waiting, key=lambda one: (served.get(one[0], 0.0), int(one[1])), default=None)
        assert (None if job is None else (job.owner, job.id)) == wanted
        if job is None:
            continue
        claims += 1
        waiting.remove(wanted)
        served[job.owner] = job.started
        if draw.random() < 0.3:
            store.give_back(job, blame=False)
            waiting.append(wanted)
        else:
            store.end(job, draw.choice((DONE, FAILED)))
    assert claims > 20


def work(store: Store) -> int:
    """What it costs to find the next job: steps of SQLite's machine, or pages that PostgreSQL looks at."""
    found: list[int] = []
    with store.engine.connect() as connection:
        if store.engine.dialect.name == "sqlite":
            connection.connection.dbapi_connection.set_progress_handler(lambda: found.append(1), 1)
            assert connection.execute(next_job()).first()
            connection.connection.dbapi_connection.set_progress_handler(None, 1)
        else:
            query = next_job().compile(connection, compile_kwargs={"literal_binds": True})
            connection.execute(sql.text("ANALYZE jobs"))
            told = connection.execute(sql.text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}")).scalar_one()
            plan = told[0]["Plan"]
            found += [1] * (plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    return len(found)


def test_jobs_that_ended_do_not_slow_the_next_one(store: Store) -> None:
    fill(store, [f"early {i}" for i in range(50)])
    fill(store, [f"waits {i}" for i in range(32)], state=QUEUED, started=None, ended=None)
    few = work(store)
    fill(store, [f"late {i}" for i in range(5000)])
    assert work(store) < 4 * few, "a hundred times as many"


def test_a_database_of_before_gets_its_indexes(database: str) -> None:
    with closing(Store(database)) as store, store.engine.begin() as connection:
        for index in jobs._JOBS.indexes:
            index.drop(connection)
    with closing(Store(database)) as store:
        found = {one["name"] for one in sql.inspect(store.engine).get_indexes("jobs")}
        assert found == {index.name for index in jobs._JOBS.indexes}


def test_jobs_are_kept_as_long_as_wanted(store: Store, tmp_path: Path) -> None:
    """Neither what waits or runs goes, nor what ended later, nor whoever's folder stays."""
    now, folder = time.time(), tmp_path / "jobs"
    folder.mkdir()
    states = {"done": DONE, "cancelled": CANCELLED, "failed": FAILED}
    for name, state in states.items():
        fill(store, [name], 1, state=state, ended=now - 8 * 86400)
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(b"a picture")
    fill(store, ["stays"], 1, ended=now - 8 * 86400)
    (folder / "stays").write_bytes(b"no folder: it cannot be removed as one")
    fill(store, ["late"], 1, ended=now - 6 * 86400)
    (folder / "late").mkdir()
    for name, state in (("waits", QUEUED), ("runs", RUNNING)):
        fill(store, [name], 1, state=state, created=now - 9 * 86400, started=None, ended=None, seen=now)
    Worker(store, folder, 1.0, SETTINGS)._tidy()
    assert len(store.of("0", 9)) == 7, "for ever, if nobody says how long"
    Worker(store, folder, 1.0, SETTINGS, keep=7)._tidy()
    assert {job.id for job in store.of("0", 9)} == {"stays", "late", "waits", "runs"}
    assert {path.name for path in folder.iterdir()} == {"stays", "late"}
    for name in ("waits", "runs"):
        store.forget(name)
        assert store.get(name, "0") is not None, "only what has ended can be forgotten"
