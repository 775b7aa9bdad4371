"""``counterpoint cite``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cite(
    image: Annotated[
        Path | None, typer.Argument(help="A picture made by counterpoint; without one, everything is listed.")
    ] = None,
) -> None:
    """Print the BibTeX of the methods behind a picture."""
    from counterpoint.apps.citations import CITATIONS
    from counterpoint.apps.cli import output

    keys = list(CITATIONS)
    if image is not None:
        from counterpoint.apps.record import read_recipe
        from counterpoint.fusion import get_fusion
        from counterpoint.types import UserError

        recipe = read_recipe(image)
        request = recipe.get("request", recipe)  # the demo's pictures have no request
        used = {
            "diffusers",
            "stable-diffusion",
            "classifier-free-guidance",
            request.get("scheduler", "unipc").partition(":")[0],
        }
        if request.get("controls") and request.get("fusion"):
            used.add("controlnet")
            try:
                rule = get_fusion(request["fusion"])
                used.update(rule.cite if len(request["controls"]) > 1 or rule.injects else ())
            except UserError:
                output.say(f"{request['fusion']} is no rule of counterpoint's: cite it yourself")
        used |= {*recipe.get("adapters", ()), *["amdm"] * (len(request.get("aggregate", ())) > 1)}
        keys = [key for key in CITATIONS if key in used]
    print("\n\n".join(CITATIONS[key] for key in keys))
