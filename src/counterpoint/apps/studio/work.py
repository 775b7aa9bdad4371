"""What happens behind the page: pictures are made in a thread, watched, kept, and made again."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from counterpoint.apps import record
from counterpoint.apps.replay import Replayed, recipe_of, replay
from counterpoint.apps.request import GenerateRequest
from counterpoint.apps.run import OneModel, run
from counterpoint.sampling.pipeline import Pipeline

_LOOK_EVERY = 0.5
"""Seconds between previews, at least."""
_LOOK_SHARE = 0.1
"""Of the time, that previews may take."""


class StoppedError(Exception):
    """The user said stop."""


@dataclass(frozen=True, eq=False)
class Progress:
    """Between two steps: which of the requests, how far it is, how the picture looks so far, if it was looked at."""

    request: int
    step: int
    steps: int
    preview: PIL.Image.Image | None


@dataclass(frozen=True, eq=False)
class Made:
    """A picture that was kept: where, by which rule, each control's part in it, the page that tells who won where, and
    how long it took."""

    path: Path
    fusion: str
    shares: dict[str, float]
    page: str
    seconds: float


class Workshop:
    """One model at a time, one request at a time.

    Args:
        folder: where pictures are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, OneModel()

    def make(self, requests: Sequence[GenerateRequest], stop: threading.Event) -> Iterator[Progress | list[Made] | str]:
        """Carry requests out one after the other: a :class:`Progress` a step, what each one made, and warnings.

        Raises:
            UserError: a setting is wrong.
            StoppedError: ``stop`` was set; what was finished before is kept.
        """
        heard: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    for number, request in enumerate(requests):
                        heard.put(self._one(number, request, stop, heard))
                for warning in spoken(caught):
                    heard.put(warning)
                heard.put(None)
            except BaseException as error:
                heard.put(error)

        thread = threading.Thread(target=work, daemon=True, name="studio")
        thread.start()
        try:
            while (event := heard.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:  # also when the page that listens has gone
            stop.set()
            thread.join()

    def _one(self, number: int, request: GenerateRequest, stop: threading.Event, heard: queue.Queue[Any]) -> list[Made]:
        pipe = self.models.of(request)
        eye = _Eye(pipe)

        def look(index: int, latents: Tensor) -> None:
            if stop.is_set():
                raise StoppedError
            heard.put(Progress(number, index + 1, request.steps, eye.look(index, latents)))

        result = run(request, pipe, look=look, report=bool(request.controls))
        recipe, made = recipe_of(result), []
        for place, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
            path = self._free()
            record.save_png(image, path, {**recipe, "seed": seed})
            report = result.report
            shares, page = ({}, "") if report is None else (report.shares(place), report.html(place))
            made.append(Made(path, request.fusion, shares, page, result.seconds))
        return made

    def again(self, path: Path) -> Replayed:
        """Make a kept picture again.

        Raises:
            UserError: its recipe is not one of this version, or an image that it names is missing.
        """
        return replay(path, {}, load=self.models.of)

    def history(self, count: int = 60) -> list[Path]:
        """The pictures that were kept, newest first."""
        return sorted(self.folder.glob("*.png"), reverse=True)[:count]

    def _free(self) -> Path:
        last = max((int(path.stem) for path in self.folder.glob("*.png") if path.stem.isdigit()), default=0)
        return self.folder / f"{last + 1:06}.png"


class _Eye:
    """Shows what a step's latents promise: where the straight line through the last two of them leads."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe, self.before = pipe, None
        self.last, self.cost = time.monotonic(), 0.0

    def look(self, index: int, latents: Tensor) -> PIL.Image.Image | None:
        """The first picture as it would come out, now and then."""
        before, self.before = self.before, latents[:1].clone()
        now = time.monotonic()
        if before is None or now - self.last < max(_LOOK_EVERY, self.cost / _LOOK_SHARE):
            return None
        promised = expected(self.pipe.scheduler, index, before, self.before)
        picture: PIL.Image.Image = self.pipe.decode(promised, "pil")[0]
        self.last, self.cost = time.monotonic(), time.monotonic() - now
        return picture


def expected(scheduler: Any, index: int, before: Tensor, after: Tensor) -> Tensor:
    """The clean latents that a step ``x -> x'`` implies, taking its noise for constant: with ``x = a x0 + s e`` and
    ``x' = a' x0 + s' e``, ``x0 = (s x' - s' x) / (s a' - s' a)``."""
    (a, s), (a2, s2) = (_scales(scheduler, place) for place in (index, index + 1))
    return (s * after - s2 * before) / (s * a2 - s2 * a)


def _scales(scheduler: Any, place: int) -> tuple[float, float]:
    """How much picture and how much noise there is before a step."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and float(scheduler.init_noise_sigma) != 1.0:  # Euler's scale: the picture is whole
        return 1.0, float(sigmas[place])
    if place >= len(scheduler.timesteps):
        return 1.0, 0.0
    alpha_bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[place])])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def spoken(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Our own warnings, each once; libraries' are not for users."""
    ours = (str(one.message) for one in caught if one.category.__module__.startswith("counterpoint"))
    return list(dict.fromkeys(ours))
