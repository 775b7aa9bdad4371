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
        if not isinstance(request, dict):
            raise UserError(f"{image} carries no recipe of generate")
        controls, rule = request.get("controls") or [], request.get("fusion") or ""
        if not isinstance(controls, list) or not isinstance(rule, str):
            raise UserError(f"{image} carries no recipe of generate")
        scheduler = str(request.get("scheduler") or "unipc").partition(":")[0]
        used = {"diffusers", "stable-diffusion", "classifier-free-guidance", scheduler}
        if controls and rule:
            used.add("controlnet")
            try:
                known = get_fusion(rule)
                used.update(known.cite if len(controls) > 1 or known.injects else ())
            except UserError:
                output.say(f"{rule} is no rule of counterpoint's: cite it yourself")
        steered = any(isinstance(one, dict) and one.get("steer", "0") != "0" for one in controls)
        used |= {*map(str, recipe.get("adapters") or ()), *["readout"] * steered}
        used |= {*["amdm"] * (len(request.get("aggregate") or ()) > 1)}
        keys = [key for key in CITATIONS if key in used]
    print("\n\n".join(CITATIONS[key] for key in keys))
