"""``counterpoint models``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

models = typer.Typer(help="What models there are, and whether they are whole.", no_args_is_help=True)
Model = Annotated[str, typer.Argument(help="tiny, a diffusers folder or a .safetensors file.")]


@models.command("list")
def list_models() -> None:
    """List the models that are shipped, with their controls."""
    from counterpoint.models.load import TINY

    controls = ", ".join(sorted(path.name for path in (TINY / "controls").iterdir()))
    size = sum(path.stat().st_size for path in TINY.rglob("*.safetensors")) / 1e6
    print(f"tiny\t128 x 128, {size:.1f} MB, controls: {controls}")


@models.command()
def show(model: Model = "tiny") -> None:
    """Show a model's parts and their sizes."""
    from counterpoint.models.load import TINY
    from counterpoint.models.weights import shapes, weight_files

    path = TINY if model == "tiny" else Path(model)
    folders = [path] if path.is_file() else sorted({file.parent for file in path.rglob("*.safetensors")}) or [path]
    for folder in folders:
        tensors = {}
        for file in [folder] if folder.is_file() else weight_files(folder):
            tensors |= shapes(file)
        count = sum(_product(shape) for shape in tensors.values())
        name = folder if folder == path else folder.relative_to(path)
        print(f"{name}\t{len(tensors)} tensors\t{count / 1e6:.2f} M parameters")


@models.command()
def verify(model: Model = "tiny") -> None:
    """Check every weight file: the shipped ones against their hashes, any folder by loading it."""
    from counterpoint.apps.cli.output import quiet_libraries
    from counterpoint.models.load import TINY, load_components
    from counterpoint.models.weights import verify_folder

    if model == "tiny":
        print(f"tiny: {verify_folder(TINY)} files match their hashes")
        return
    quiet_libraries()
    load_components(model)
    print(f"{model}: every part loads and fits its configuration")


@models.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .pth, .ckpt, .bin or .pt file.")],
    out: Annotated[Path | None, typer.Argument(help="The safetensors file; default beside it.")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read the pickle; tensors are taken from it, code is never run.")
    ] = False,
) -> None:
    """Turn a pickled checkpoint into safetensors."""
    from safetensors.torch import save

    from counterpoint.apps.record import write_whole
    from counterpoint.models.weights import read_pickle
    from counterpoint.types import UserError

    target = out or source.with_suffix(".safetensors")
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: give a name that ends in .safetensors")
    if target.exists():
        raise UserError(f"{target} is there already; give another name")
    if not trust_pickle:
        raise UserError(f"{source} is a pickle; if you trust where it comes from, say --trust-pickle")
    tensors = read_pickle(source)
    write_whole(target, lambda file: file.write(save(tensors)))
    print(f"{target}\t{len(tensors)} tensors")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
