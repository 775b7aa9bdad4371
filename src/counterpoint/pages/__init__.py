"""HTML pages that need nothing but themselves and the pictures beside them."""

from __future__ import annotations

import jinja2

_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("counterpoint.pages", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(page: str, **values: object) -> str:
    """Fill a page of this folder."""
    return _PAGES.get_template(page).render(**values)
