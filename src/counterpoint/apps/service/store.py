"""Jobs on disk: what was accepted survives a restart, and every job ends once."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from counterpoint.types import UserError

QUEUED, RUNNING, DONE, CANCELLED, FAILED = "queued", "running", "done", "cancelled", "failed"
ENDED = (DONE, CANCELLED, FAILED)
LEASE = 10.0
"""Seconds without a sign of life after which a job's worker is held to be gone."""
ATTEMPTS = 2
"""How often a job is begun before it is held to be what kills its worker."""

_QUEUE = 0x636F756E
"""Number of PostgreSQL's lock that whoever counts the queue holds."""
_TABLES = sql.MetaData()
_JOBS = sql.Table(
    "jobs",
    _TABLES,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("owner", sql.String(64), nullable=False),
    sql.Column("state", sql.String(16), nullable=False),
    sql.Column("request", sql.JSON, nullable=False),
    sql.Column("estimate", sql.Float, nullable=False),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("started", sql.Float),
    sql.Column("ended", sql.Float),
    sql.Column("seen", sql.Float),
    sql.Column("attempts", sql.Integer, nullable=False, default=0),
    sql.Column("cancel", sql.Boolean, nullable=False, default=False),
    sql.Column("step", sql.Integer, nullable=False, default=0),
    sql.Column("steps", sql.Integer, nullable=False, default=0),
    sql.Column("images", sql.JSON),
    sql.Column("reason", sql.Text, nullable=False, default=""),
    sql.Index("jobs_by_state", "state", "owner"),
    sql.Index("jobs_served", "owner", "started"),
    sql.Index("jobs_latest", "owner", "created"),
    sql.Index("jobs_ended", "ended"),
)


@dataclass(frozen=True)
class Job:
    """A job as it is now; times are seconds since the epoch, ``seen`` that of its worker's last sign of life."""

    id: str
    owner: str
    state: str
    request: dict[str, Any]
    estimate: float
    created: float
    started: float | None
    ended: float | None
    seen: float | None
    attempts: int
    cancel: bool
    step: int
    steps: int
    images: list[dict[str, Any]] | None
    reason: str


class Store:
    """Jobs in a database; every change is one statement that names the state it starts from, and of a job that runs
    the claim.

    Args:
        url: of SQLAlchemy's kind, such as ``sqlite:///jobs.db`` or ``postgresql+psycopg://...``.

    Raises:
        UserError: it is none, or the database cannot be reached.
    """

    def __init__(self, url: str) -> None:
        patient = {"timeout": 30} if url.startswith("sqlite") else {}
        try:
            self.engine = sql.create_engine(url, connect_args=patient, pool_pre_ping=True, hide_parameters=True)
            _TABLES.create_all(self.engine)
            for index in _JOBS.indexes:  # a database of before may lack some
                index.create(self.engine, checkfirst=True)
            if self.engine.dialect.name == "sqlite":  # whoever reads waits for nobody who writes
                with self.engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except ImportError as error:
            raise UserError(
                f"--database {_shown(url)}: {error}; PostgreSQL wants pip install 'counterpoint[postgres]'"
            ) from None
        except sql.exc.SQLAlchemyError as error:
            first, _, _ = str(error).partition("\n")
            raise UserError(f"--database {_shown(url)}: {first}") from None
        except ValueError:  # which quotes what it takes for the port
            raise UserError(f"--database {_shown(url)}: its port is no number; in a password, write @ as %40, : as %3A "
                            "and / as %2F") from None  # fmt: skip

    def close(self) -> None:
        """Give the database's connections back."""
        self.engine.dispose()

    def add(
        self, job: str, owner: str, request: dict[str, Any], estimate: float, most: int = 2**31, most_each: int = 2**31
    ) -> str:
        """Queue a job under an id, unless that is more jobs than may wait or run: whose queue is full, else ``""``."""
        row = {"id": job, "owner": owner, "state": QUEUED, "request": request, "estimate": estimate}
        with self.engine.connect() as connection:
            if self.engine.dialect.name == "postgresql":  # SQLite lets one write at a time anyway
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_QUEUE)))
            connection.execute(_JOBS.insert().values(**row, created=time.time()))
            if full := _full(connection, owner, most, most_each):
                return full
            connection.commit()
        return ""

    def full(self, owner: str, most: int, most_each: int) -> str:
        """Whose queue would be, as :meth:`add` says it: a look before the work that goes before it."""
        with self.engine.connect() as connection:
            return _full(connection, owner, most - 1, most_each - 1)

    def done(self, most: int) -> list[Job]:
        """The latest jobs of all owners that are done, the newest first."""
        wanted = _JOBS.select().where(_JOBS.c.state == DONE).order_by(_JOBS.c.ended.desc()).limit(most)
        with self.engine.connect() as connection:
            return [Job(**row._mapping) for row in connection.execute(wanted)]

    def get(self, job: str, owner: str) -> Job | None:
        """An owner's job."""
        with self.engine.connect() as connection:
            row = connection.execute(_JOBS.select().where(_JOBS.c.id == job, _JOBS.c.owner == owner)).first()
        return None if row is None else Job(**row._mapping)

    def of(self, owner: str, most: int) -> list[Job]:
        """An owner's latest jobs, the newest first."""
        wanted = _JOBS.select().where(_JOBS.c.owner == owner).order_by(_JOBS.c.created.desc()).limit(most)
        with self.engine.connect() as connection:
            return [Job(**row._mapping) for row in connection.execute(wanted)]

    def claim(self) -> Job | None:
        """Begin the oldest job of the owner who was served least recently; two workers never get the same."""
        with self.engine.begin() as connection:
            row = connection.execute(next_job()).first()
            if row is None:
                return None
            mine = _JOBS.update().where(_JOBS.c.id == row.id, _JOBS.c.state == QUEUED)
            now = time.time()
            begun = {"state": RUNNING, "started": now, "seen": now, "attempts": row.attempts + 1, "step": 0}
            if connection.execute(mine.values(**begun)).rowcount != 1:
                return None
        return Job(**{**row._mapping, **begun})

    def progress(self, job: Job, step: int, steps: int) -> None:
        """Note how far a claimed job is."""
        with self.engine.begin() as connection:
            connection.execute(_JOBS.update().where(_claimed(job)).values(step=step, steps=steps))

    def alive(self, job: Job) -> bool:
        """A sign of life from a claimed job's worker; whether it still is that worker's."""
        with self.engine.begin() as connection:
            return connection.execute(_JOBS.update().where(_claimed(job)).values(seen=time.time())).rowcount == 1

    def to_cancel(self, job: str) -> bool:
        """Whether somebody asked for it."""
        with self.engine.connect() as connection:
            return bool(connection.execute(sql.select(_JOBS.c.cancel).where(_JOBS.c.id == job)).scalar())

    def end(self, job: Job, state: str, reason: str = "", images: Sequence[dict[str, Any]] | None = None) -> bool:
        """End a claimed job; whether it had not ended before, nor been claimed by another since."""
        values = {"state": state, "reason": reason, "images": None if images is None else list(images)}
        mine = _JOBS.update().where(_claimed(job))
        with self.engine.begin() as connection:
            return connection.execute(mine.values(**values, ended=time.time())).rowcount == 1

    def give_back(self, job: Job, *, blame: bool) -> None:
        """Queue a claimed job again; with ``blame`` it fails if it was begun :data:`ATTEMPTS` times."""
        with self.engine.begin() as connection:
            connection.execute(_queued_again(_claimed(job), blame))

    def recover(self) -> None:
        """Queue again what runs without a worker: after a restart, or when a machine is gone."""
        silent = sql.and_(_JOBS.c.state == RUNNING, _JOBS.c.seen < time.time() - LEASE)
        with self.engine.begin() as connection:
            connection.execute(_queued_again(silent, blame=True))

    def cancel(self, job: str, owner: str) -> bool:
        """Cancel a queued job, or ask a running one to stop; whether there is such a job that has not ended."""
        mine = (_JOBS.c.id == job, _JOBS.c.owner == owner)
        with self.engine.begin() as connection:
            waiting = _JOBS.update().where(*mine, _JOBS.c.state == QUEUED)
            ended = connection.execute(waiting.values(state=CANCELLED, cancel=True, ended=time.time())).rowcount
            running = _JOBS.update().where(*mine, _JOBS.c.state == RUNNING)
            return bool(ended or connection.execute(running.values(cancel=True)).rowcount)

    def old(self, before: float, most: int) -> list[str]:
        """Jobs that ended before a time, in seconds since the epoch."""
        wanted = sql.select(_JOBS.c.id).where(_JOBS.c.ended < before).limit(most)
        with self.engine.connect() as connection:
            return list(connection.execute(wanted).scalars())

    def forget(self, job: str) -> None:
        """Remove a job that has ended."""
        with self.engine.begin() as connection:
            connection.execute(_JOBS.delete().where(_JOBS.c.id == job, _JOBS.c.state.in_(ENDED)))

    def wipe(self, job: Job) -> None:
        """Forget the words of a job that has ended."""
        rest = {**job.request, "prompt": "", "negative_prompt": "", "subject": []}
        with self.engine.begin() as connection:
            ended = _JOBS.update().where(_JOBS.c.id == job.id, _JOBS.c.state.in_(ENDED))
            connection.execute(ended.values(request=rest))

    def counts(self) -> dict[str, int]:
        """State -> jobs."""
        counted = sql.select(_JOBS.c.state, sql.func.count()).group_by(_JOBS.c.state)
        with self.engine.connect() as connection:
            found = dict(iter(connection.execute(counted)))
        return {state: found.get(state, 0) for state in (QUEUED, RUNNING, *ENDED)}

    def waiting(self) -> tuple[int, float]:
        """Jobs that are queued or running, and their estimated seconds."""
        counted = sql.select(sql.func.count(), sql.func.coalesce(sql.func.sum(_JOBS.c.estimate), 0.0)).where(
            _JOBS.c.state.in_((QUEUED, RUNNING))
        )
        with self.engine.connect() as connection:
            count, seconds = connection.execute(counted).one()
        return int(count), float(seconds)


def next_job() -> sql.Select[Any]:
    """The oldest job of the owner who was served least recently. It reads the jobs that wait, and of an index one entry
    for each, however many have ended."""
    others = _JOBS.alias()
    served = sql.select(sql.func.max(others.c.started)).where(others.c.owner == _JOBS.c.owner).correlate(_JOBS)
    last = sql.func.coalesce(served.scalar_subquery(), 0.0)
    return _JOBS.select().where(_JOBS.c.state == QUEUED).order_by(last, _JOBS.c.created).limit(1)


def _shown(url: str) -> str:
    """A URL without its password, also one that cannot be read."""
    return re.sub(r"(://[^:/@]*:).*@", r"\1***@", url)


def _full(connection: sql.Connection, owner: str, most: int, most_each: int) -> str:
    counted = sql.select(sql.func.count()).where(_JOBS.c.state.in_((QUEUED, RUNNING)))
    if connection.execute(counted.where(_JOBS.c.owner == owner)).scalar_one() > most_each:
        return "your"
    return "the" if connection.execute(counted).scalar_one() > most else ""


def _claimed(job: Job) -> sql.ColumnElement[bool]:
    """A job as long as it belongs to whoever claimed it then: a worker that was silent may find it another's."""
    return sql.and_(_JOBS.c.id == job.id, _JOBS.c.state == RUNNING, _JOBS.c.started == job.started)


def _queued_again(which: sql.ColumnElement[bool], blame: bool) -> sql.Update:
    """In one statement, so that nothing happens between a look and a change."""
    spent = sql.and_(~_JOBS.c.cancel, _JOBS.c.attempts >= ATTEMPTS) if blame else sql.false()
    died = sql.literal("its worker died ") + sql.cast(_JOBS.c.attempts, sql.String) + " times"
    return (
        _JOBS.update()
        .where(which)
        .values(
            state=sql.case((_JOBS.c.cancel, CANCELLED), (spent, FAILED), else_=QUEUED),
            ended=sql.case((sql.or_(_JOBS.c.cancel, spent), time.time()), else_=None),
            reason=sql.case((spent, died), else_=""),
            attempts=_JOBS.c.attempts if blame else _JOBS.c.attempts - 1,
        )
    )
