"""``counterpoint studio``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def studio(
    model: Annotated[str, typer.Option(help="tiny, a diffusers folder, a .safetensors file or a hub id.")] = "tiny",
    controlnet: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=MODEL", help="A ControlNet to offer besides the model's own. Repeatable."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where pictures are kept.")] = Path("counterpoint-studio"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 7860,
    login: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="NAME:PASSWORD, one a line; needed on any address but this machine's own."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or openvino: a CPU, faster.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the hardware has it.")] = "fp32",
    compile: Annotated[
        bool, typer.Option("--compile", help="Let torch compile the networks: minutes for the first picture.")
    ] = False,
) -> None:
    """Open a page in the browser: controls by upload, drawing or photo, rules side by side, history."""
    import os

    from counterpoint.apps import record
    from counterpoint.apps.cli import output
    from counterpoint.apps.cli.listen import listening, loopback
    from counterpoint.apps.cli.values import pairs
    from counterpoint.types import UserError, check_label

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from counterpoint.apps.studio.page import CSS, KEYS, THEME, Page
    except ImportError:
        raise UserError("studio needs packages that are not installed: pip install 'counterpoint[studio]'") from None
    users = _users(login)
    if not users and not loopback(host):
        raise UserError(f"--host {host} is open to others: give --login FILE")
    networks = pairs("--controlnet", controlnet)
    for label in networks:
        check_label(label)
    record.check_writable(folder)
    output.quiet_libraries()

    from counterpoint.api import load
    from counterpoint.apps.studio.form import Offer
    from counterpoint.apps.studio.work import Workshop
    from counterpoint.models.load import locate

    with listening(host, port) as probe:
        port = probe.getsockname()[1]
    dtype = output.told_dtype(dtype, device)
    pipe = load(model, networks, device=device, dtype=dtype, compile=compile)
    folder.mkdir(parents=True, exist_ok=True)
    offer = Offer(model, pipe.native_size, pipe.guidance_scale, networks, device, dtype, compile)
    page = Page(Workshop(folder), offer, locate(model)).build()
    del pipe
    try:
        page.launch(
            server_name=host,
            server_port=port,
            auth=users or None,
            quiet=True,
            share=False,
            prevent_thread_lock=True,
            footer_links=[],
            allowed_paths=[str(folder.resolve())],
            max_file_size="32mb",
            theme=THEME,
            css=CSS,
            head=KEYS,
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port") from None
    output.say(f"the studio is at http://{host}:{port}; Ctrl+C ends it")
    page.block_thread()


def _users(path: Path | None) -> list[tuple[str, str]]:
    from counterpoint.apps.cli.listen import secrets_in
    from counterpoint.types import UserError

    users = [tuple(line.split(":", 1)) for line in secrets_in(path, "logins")]
    if path is None:
        return users
    if not users or any(len(user) != 2 or len(user[1]) < 8 for user in users):
        raise UserError(f"{path} holds no NAME:PASSWORD lines, or a password of fewer than 8 characters")
    return users
