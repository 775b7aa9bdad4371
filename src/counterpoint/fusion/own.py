"""Rules of one's own, from a Python file: for comparing them with those that are here."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from counterpoint.fusion import FUSIONS, RULES
from counterpoint.types import Fusion, UserError


def read_rules(path: Path) -> str:
    """Add the public functions of a file to the rules, each under its name.

    A function of features ``(n, b, c, h, w) -> (b, c, h, w)`` is a rule. One whose parameters all have defaults makes a
    rule, or a whole :class:`Fusion`, from settings, which names may carry as in ``mine:sharpness=2``.

    The file is run. It is whoever calls this that answers for it: no recipe, job or model leads here.

    Returns:
        The file's SHA-256, which tells one version of the rules from another.

    Raises:
        UserError: it is no Python file, it fails, holds no function, or a name is taken.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} fails: {type(error).__name__}: {error}") from None
    mine = {
        name: one
        for name, one in vars(module).items()
        if inspect.isfunction(one) and one.__module__ == spec.name and not name.startswith("_")
    }
    if not mine:
        raise UserError(f"{path} has no function whose name could be a rule's")
    if taken := sorted(mine.keys() & RULES.keys()):
        raise UserError(f"{path}: there is a rule {taken[0]!r} already")
    builders, made = {name: _builder(name, one, path) for name, one in mine.items()}, {}
    for name, build in builders.items():
        try:
            made[name] = build()
        except Exception as error:
            raise UserError(f"{path}: {name} fails: {type(error).__name__}: {error}") from None
    RULES.update(builders)
    FUSIONS.update(made)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _builder(name: str, one: Callable[..., Any], path: Path) -> Callable[..., Fusion]:
    told = (inspect.getdoc(one) or f"of {path.name}").splitlines()[0]
    settable = all(
        setting.default is not inspect.Parameter.empty for setting in inspect.signature(one).parameters.values()
    )
    if not settable:
        return lambda: Fusion(name, told, one)

    @functools.wraps(one)
    def build(**settings: Any) -> Fusion:
        made = one(**settings)
        return made if isinstance(made, Fusion) else Fusion(name, told, made)

    return build
