"""``counterpoint``: the verbs, and how they fail."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from counterpoint import __version__
from counterpoint.apps.cli.batch import batch
from counterpoint.apps.cli.benchmark import benchmark
from counterpoint.apps.cli.cite import cite
from counterpoint.apps.cli.demo import demo
from counterpoint.apps.cli.evaluate import evaluate
from counterpoint.apps.cli.extract import extract
from counterpoint.apps.cli.generate import generate
from counterpoint.apps.cli.models import models
from counterpoint.apps.cli.pairs import pairs
from counterpoint.apps.cli.replay import replay
from counterpoint.apps.cli.serve import serve
from counterpoint.apps.cli.studio import studio
from counterpoint.apps.cli.train import LATEST, train

app = typer.Typer(
    name="counterpoint",
    help="Many controls, one image: diffusion under several simultaneous controls.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(generate)
app.command()(batch)
app.command()(studio)
app.command()(serve)
app.command()(replay)
app.command()(extract)
app.command()(train)
app.command()(pairs)
app.command()(evaluate)
app.command()(benchmark)
app.add_typer(models, name="models")
app.command()(cite)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a verb.

    Exit status: 0; 2 and one line for the user's mistake; 1 and a traceback for ours; 130 after Ctrl-C.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    try:
        sys.exit(app(_complete(sys.argv[1:]), standalone_mode=False))
    except typer.TyperException as error:
        message = error.format_message()
        if not message.startswith("Usage:"):
            _fail(message)
        print(message)  # nothing was asked for
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        from counterpoint.types import UserError

        if not isinstance(error, UserError):
            raise
        _fail(str(error))


def _complete(arguments: list[str]) -> list[str]:
    """Give ``--resume`` its value where it stands alone: the parser knows no optional ones."""
    done: list[str] = []
    for argument, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        done += [argument, LATEST] if argument == "--resume" and following.startswith("-") else [argument]
    return done


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
