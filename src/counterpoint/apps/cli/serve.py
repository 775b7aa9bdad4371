"""``counterpoint serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=0, max=65535)] = 8642,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="A model to offer; default tiny. Repeatable.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where jobs and pictures are kept.")] = Path("counterpoint-service"),
    database: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="COUNTERPOINT_DATABASE",
            help="Of the jobs, as SQLAlchemy has it; default SQLite in --folder. Others see a command line: "
            "a URL with a password is better given in the environment, as COUNTERPOINT_DATABASE.",
        ),
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys, one a line; needed on any address but this machine's own."),
    ] = None,
    max_seconds: Annotated[float, typer.Option(help="That a job may take.", min=1)] = 600.0,
    max_steps: Annotated[int, typer.Option(help="Of a job.", min=1, max=1000)] = 150,
    max_pixels: Annotated[int, typer.Option(help="Of a picture.", min=64, max=4096 * 4096)] = 4_194_304,
    max_controls: Annotated[int, typer.Option(help="Of a job.", min=0, max=64)] = 8,
    max_images: Annotated[int, typer.Option(help="Of a job.", min=1, max=64)] = 8,
    max_bytes: Annotated[int, typer.Option(help="Of a request.", min=1000)] = 32_000_000,
    max_queue: Annotated[int, typer.Option(help="Jobs that wait or run.", min=1)] = 256,
    max_queue_each: Annotated[int, typer.Option(help="Of one API key.", min=1)] = 64,
    keep: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS", help="Remove a job and its pictures so long after it has ended; default never.", min=0.01
        ),
    ] = None,
    safety: Annotated[str, typer.Option(help="What happens to unsafe pictures: off, flag, blur or refuse.")] = "off",
    safety_checker: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="For --safety: diffusers' safety checker, or MODULE:FUNCTION, installed here."
        ),
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds for the job at hand when the service ends.", min=0)] = 30,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Serve from a Ray cluster (HOST:PORT, or local); --folder is the same everywhere."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="For --ray: how many answer and work.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or openvino: a CPU, faster.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the hardware has it.")] = "fp32",
    compile: Annotated[
        bool, typer.Option("--compile", help="Let torch compile the networks: minutes for the first picture.")
    ] = False,
) -> None:
    """Offer pictures over HTTP: jobs, events, results; OpenAPI at /docs."""
    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.cli.listen import listening, loopback
    from counterpoint.apps.cli.values import pairs
    from counterpoint.types import UserError

    try:
        from counterpoint.apps.service.app import make_app
        from counterpoint.apps.service.server import Server
        from counterpoint.apps.service.state import Config
    except ImportError:
        raise UserError("serve needs packages that are not installed: pip install 'counterpoint[serve]'") from None
    import torch

    from counterpoint.api import check_compile, find_device
    from counterpoint.apps.service.safety import load_safety
    from counterpoint.apps.service.schema import Limits
    from counterpoint.models.load import native_size

    record.check_writable(folder)
    known = _keys(keys)
    if not known and not loopback(host):
        raise UserError(f"--host {host} is open to others: give --keys FILE")
    find_device(device)
    if compile:
        check_compile(device)
    dtype = output.told_dtype(dtype, device)
    load_safety(safety, safety_checker)
    if ray not in {None, "local"} and not database:
        raise UserError("--ray ADDRESS: several machines cannot share SQLite; give --database postgresql+psycopg://...")
    output.quiet_libraries()
    models = pairs("--model", model) or {"tiny": "tiny"}
    sizes = {name: native_size(source) for name, source in models.items()}
    limits = Limits(max_bytes, max_pixels, max_controls, max_steps, max_images, max_queue, max_queue_each, max_seconds)
    config = Config(
        folder.resolve(), models, sizes, known, database, limits, device, dtype, compile, safety, safety_checker, grace,
        torch.get_num_threads(), keep,
    )  # fmt: skip
    with listening(host, port) as probe:
        app = make_app(config)
        port = probe.getsockname()[1]

        def ready() -> None:
            output.say(f"listening on http://{host}:{port}, API at /docs")

        if ray is None:
            ready()
            Server(app).run(sockets=[probe])
            return
    from counterpoint.apps.service.many import serve_on_ray

    serve_on_ray(ray, config, replicas, host, port, ready)


def _keys(path: Path | None) -> frozenset[str]:
    from counterpoint.apps.cli.listen import secrets_in
    from counterpoint.types import UserError

    keys = frozenset(secrets_in(path, "keys"))
    if path is None:
        return keys
    if not keys or min(map(len, keys)) < 16:
        raise UserError(f"{path} holds no keys, or one of fewer than 16 characters")
    return keys
