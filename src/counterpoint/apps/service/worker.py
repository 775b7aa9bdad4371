"""Who carries jobs out: a process of its own, so that one that dies takes nobody with it."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from counterpoint.apps.service.store import CANCELLED, DONE, FAILED, LEASE, Job, Store

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)
_POLL = 0.1
_PAUSE = 1.0
"""Seconds before the next try where something of ours failed, such as the database."""
_DAY = 86400.0
_OLD = 100
"""Jobs that are removed at a time, so that those that wait do not wait for it."""
_FAULT = "fault"
"""What became of a job that met a fault of ours: it failed, and so would the next there, since a GPU's errors stay."""
Settings = dict[str, Any]
"""What a worker is told when it starts: ``safety`` (an action), ``checker`` (what checks), ``threads``, and ``models``
(where those are that jobs may name, and what they are called)."""


class Worker(threading.Thread):
    """Takes jobs from a store and has them carried out by a process, which it starts again when it dies.

    Args:
        store: the jobs.
        folder: where each job has a folder of its id.
        limit: seconds a job may run.
        settings: of the process.
        finished: hears ``(job, seconds)`` of each that is done.
        keep: days after which a job that has ended is removed; without, none is.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        limit: float,
        settings: Settings,
        finished: Callable[[Job, float], None] = lambda *_: None,
        keep: float | None = None,
    ) -> None:
        super().__init__(daemon=True, name="worker")
        self.store, self.folder, self.limit, self.settings, self.finished = store, folder, limit, settings, finished
        self.keep = keep
        self.stopping, self.wake = threading.Event(), threading.Event()
        self.patience = 0.0
        self.process: Any = None
        self.link: Connection | None = None

    def run(self) -> None:
        """Work until told to stop."""
        looked = 0.0
        atexit.register(self._abandon)
        try:
            while not self.stopping.is_set():
                try:
                    if time.monotonic() - looked > LEASE / 4:
                        self._tidy()
                        looked = time.monotonic()
                    self._next()
                except Exception:  # a job that was begun is queued again when its lease ends
                    _LOG.exception("the worker could not go on and tries again")
                    self._kill()
                    self.stopping.wait(_PAUSE)
        finally:
            self._kill()
            atexit.unregister(self._abandon)

    def close(self, patience: float) -> None:
        """Claim nothing more; finish the job at hand if it takes no longer than so many seconds, else queue it again.
        Who asked first is heard."""
        if not self.stopping.is_set():
            self.patience = time.monotonic() + patience
            self.stopping.set()
        self.wake.set()

    def stop(self, patience: float) -> None:
        """The same, and wait."""
        self.close(patience)
        self.join()

    def _tidy(self) -> None:
        """Queue again what lost its worker, and remove what was kept long enough: known until its folder is gone."""
        self.store.recover()
        if self.keep is None:
            return
        for name in self.store.old(time.time() - self.keep * _DAY, _OLD):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if not (self.folder / name).exists():
                self.store.forget(name)

    def _next(self) -> None:
        job = self.store.claim()
        if job is None:
            self.wake.wait(_POLL * 2)
            self.wake.clear()
        elif job.request.get("model") not in self.settings["models"]:
            self.store.end(job, FAILED, "the model that it asks for is no longer offered")
        else:
            self._carry_out(job)

    def _carry_out(self, job: Job) -> None:
        began = time.monotonic()
        try:
            link = self._linked()
            link.send((job.request, str(self.folder / job.id)))
            self._follow(job, link, began)
        except (EOFError, BrokenPipeError, ConnectionResetError, OSError):
            self._kill()
            self.store.give_back(job, blame=not self.stopping.is_set())

    def _follow(self, job: Job, link: Connection, began: float) -> None:
        asked, told = False, began
        while True:
            if time.monotonic() - told > LEASE / 4:
                told = time.monotonic()
                if not self._patiently(self.store.alive, job):  # it was silent for too long, and another has the job
                    self._kill()
                    return
            if link.poll(_POLL):
                kind, content = link.recv()
                if kind == "step":
                    self._patiently(self.store.progress, job, *content)
                elif kind == DONE:
                    if self._patiently(self.store.end, job, DONE, "", content):
                        self.finished(replace(job, images=content), time.monotonic() - began)
                    return
                else:
                    if kind == _FAULT:
                        self._kill()
                    self._patiently(self.store.end, job, CANCELLED if kind == CANCELLED else FAILED, content)
                    return
            if not asked and self._patiently(self.store.to_cancel, job.id):
                asked = True
                link.send("cancel")
            if time.monotonic() - began > self.limit:
                self._kill()
                self._patiently(self.store.end, job, FAILED, f"it took longer than {self.limit:g} seconds")
                return
            if self._over():
                self._kill()
                self.store.give_back(job, blame=False)
                return

    def _over(self) -> bool:
        return self.stopping.is_set() and time.monotonic() > self.patience

    def _patiently(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """What the database answers, however long it is away: the job goes on, and is not to blame."""
        while True:
            try:
                return call(*arguments)
            except SQLAlchemyError:
                if self._over():
                    raise
                _LOG.warning("the database does not answer", exc_info=True)
                time.sleep(_PAUSE)

    def _linked(self) -> Connection:
        if self.process is None or not self.process.is_alive():
            self._kill()
            context = get_context("spawn")
            self.link, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs, self.settings), daemon=True)
            self.process.start()
            theirs.close()
        assert self.link is not None
        return self.link

    def _abandon(self) -> None:
        """When the service ends unasked: multiprocessing would ask the process to end, which it does not hear, and
        wait."""
        self.close(0)
        if self.process is not None:
            self.process.kill()

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.link is not None:
            self.link.close()
        self.process = self.link = None


class _CancelledError(Exception):
    """Somebody asked for it."""


def work(link: Connection, settings: Settings) -> None:
    """The process: job after job from the link, one message a step and one at the end."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):  # the service decides when it ends, also when all of its group hear
        signal.signal(number, signal.SIG_IGN)
    import torch

    torch.set_num_threads(settings["threads"])
    from counterpoint.apps.cli.output import quiet_libraries
    from counterpoint.apps.service.safety import load_safety

    quiet_libraries()
    runner = _Runner(link, load_safety(settings["safety"], settings["checker"]), settings["models"])
    while True:
        try:
            message = link.recv()
        except EOFError:
            return
        if message == "cancel":  # of a job that had just ended
            continue
        try:
            link.send(runner.carry_out(*message))
        except BrokenPipeError:  # the service is gone, and whoever comes next begins the job again
            return


class _Runner:
    """Carries jobs out."""

    def __init__(self, link: Connection, safety: Any, names: Mapping[str, str]) -> None:
        from counterpoint.apps.run import OneModel

        self.link, self.safety, self.names, self.models = link, safety, names, OneModel()

    def carry_out(self, content: dict[str, Any], folder: str) -> tuple[str, Any]:
        """What becomes of a job, and its pictures or why not."""
        import warnings

        from counterpoint.apps.run import is_out_of_memory
        from counterpoint.types import UserError

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return DONE, self._pictures(content, Path(folder))
        except _CancelledError:
            return CANCELLED, ""
        except BrokenPipeError:
            raise
        except UserError as error:
            return FAILED, " ".join(str(error).replace(f"{folder}/", "").split())
        except Exception as error:
            if not is_out_of_memory(error):
                _LOG.exception("a job failed")
                return _FAULT, f"internal error: {type(error).__name__}"
        self.models.forget()  # the error is gone, and with it what its traceback had in memory
        return FAILED, "out of memory: ask for fewer or smaller pictures"

    def _pictures(self, content: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        from counterpoint.apps import record
        from counterpoint.apps.replay import recipe_of
        from counterpoint.apps.request import GenerateRequest, build
        from counterpoint.apps.run import run

        request = build(GenerateRequest, **content)
        result = run(request, self.models.of(request), listen=self._heard)
        recipe, made, each = self._told(recipe_of(result), folder), [], round(result.seconds / len(result.images), 4)
        for number, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
            image, verdict = self.safety(image)
            record.save_png(image, folder / f"{number}.png", {**recipe, "seed": seed, "safety": verdict})
            made.append({"seed": seed, "safety": verdict, "seconds": each})
        return made

    def _told(self, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
        """A recipe as clients may read it: with the names of files and of the model, not where they are here."""
        request = json.loads(json.dumps(recipe["request"]).replace(json.dumps(f"{folder}/")[1:-1], ""))
        return {**recipe, "request": {**request, "model": self.names[request["model"]]}}

    def _heard(self, step: int, steps: int) -> None:
        self.link.send(("step", (step, steps)))
        while self.link.poll():
            if self.link.recv() == "cancel":
                raise _CancelledError
