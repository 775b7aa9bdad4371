"""What verbs say while they work: bars on a terminal, plain lines elsewhere, warnings in one line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def told_dtype(dtype: str, device: str) -> str:
    """A precision by name; which one ``auto`` is is said.

    Raises:
        UserError: there is no such precision or device.
    """
    from counterpoint.api import find_dtype

    found = find_dtype(dtype, device)
    if dtype == "auto":
        say(f"--dtype auto is {found} here")
    return found


def say(text: str) -> None:
    """A line for people, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def record(values: dict[str, Any]) -> None:
    """One machine-readable record on stdout."""
    print(json.dumps(values, default=str, allow_nan=False), flush=True)


def quiet_libraries() -> None:
    """Keep the loading bars of the libraries beneath us off the user's terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def progress(label: str, unit: str = "step") -> Iterator[Callable[[int, int], None]]:
    """A listener for ``(done, total)``."""
    if not sys.stderr.isatty():
        yield (
            lambda done, total: (
                say(f"{label}: {unit} {done} of {total}") if done == total or done % max(total // 4, 1) == 0 else None
            )
        )
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, leave=False) as bar:

        def heard(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield heard


@contextmanager
def spoken_warnings(*kinds: type[Warning]) -> Iterator[None]:
    """Show warnings of these kinds as one line each, and no others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:
            warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        yield
