"""Benchmark pairs of annotated photos and backgrounds, drawn once and written down: whoever has the same files has the
same cases.

A manifest is JSON, a case a line, with the name and SHA-256 of every file. ``conflicting``: people of one photo over
the background of another (Cross-ControlNet, 2025, section 4.1); ``complementary``: maps of one captioned photo.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.annotations import Entry, person
from counterpoint.data.beside import Pictures
from counterpoint.data.coco import AnnotatedPhotos
from counterpoint.data.photos import Photo, read_bytes
from counterpoint.types import UserError

SCHEMA = 1
PROMPT = "a photo of a person"
"""Of conflicting cases: backgrounds have no captions."""
Row = dict[str, Any]


def draw_pairs(
    entries: Sequence[Entry], photos: Path, backgrounds: Path | None = None, *, n: int | None = None, seed: int = 0
) -> list[Row]:
    """Rows of a manifest: conflicting cases of photos with a whole person, each with a background of its own, then
    complementary cases of photos with captions; photos whose annotations are broken are left out.

    Args:
        entries: the photos' annotations.
        photos: folder of their files.
        backgrounds: folder of photos without people; without one there are no conflicting cases.
        n: of either sort; default as many as there are.
        seed: of the order in which they are drawn.

    Raises:
        UserError: there are fewer than ``n``, or none, or a file is missing.
    """
    rng = np.random.default_rng(seed)
    whole = [entry for entry in entries if not entry.damage]
    people = _shuffled([entry for entry in whole if entry.shows_a_whole_person], rng)
    behind = [] if backgrounds is None else _shuffled(Pictures(backgrounds, 1).paths, rng)
    captioned = _shuffled([entry for entry in whole if entry.captions], rng)
    pairs = list(zip(people, behind, strict=False))[:n]
    if n is not None and backgrounds is not None and len(pairs) < n:
        raise UserError(
            f"there are {len(people)} photos with a whole person and {len(behind)} backgrounds; {n} pairs are asked for"
        )
    if n is not None and 0 < len(captioned) < n:
        raise UserError(f"there are {len(captioned)} photos with captions; {n} cases are asked for")
    if not pairs and not captioned:
        raise UserError(f"{photos} has neither captions nor, with a folder of backgrounds, whole people")
    conflicting = [
        {
            **_head("conflicting", number, PROMPT),
            "person": {**_photo(entry, photos), "people": [one.__dict__ for one in entry.people]},
            "background": {"file": path.relative_to(backgrounds).as_posix(), "sha256": _hash(path)},
        }
        for number, (entry, path) in enumerate(pairs)
    ]
    complementary = [
        {
            **_head("complementary", number, entry.captions[0][1]),
            "photo": {**_photo(entry, photos), "caption": entry.captions[0][0]},
        }
        for number, entry in enumerate(captioned[:n])
    ]
    return [*conflicting, *complementary]


def dump(rows: Sequence[Row]) -> str:
    """A manifest's text."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def open_manifest(path: Path, photos: Path, backgrounds: Path | None, size: int) -> dict[str, Sequence[Photo]]:
    """The photos that a manifest lists, in its order, as the sets of :mod:`counterpoint.data.published`.

    Args:
        path: of the manifest.
        photos: folder of the annotated photos.
        backgrounds: of the others, if it has conflicting cases.
        size: to which pictures are brought.

    Raises:
        UserError: a line is malformed, or files are missing or others than those that were listed; they are named.
    """
    people, captioned, behind = [], [], []
    wrong: list[str] = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            row = json.loads(line)
            if row["schema"] != SCHEMA or row["sort"] not in {"conflicting", "complementary"}:
                raise UserError(f"its schema is {row['schema']}, its sort {row['sort']}")
            own = row["person" if row["sort"] == "conflicting" else "photo"]
            entry = _entry(own, row["prompt"])
            wrong += _changed(photos, own)
            if row["sort"] == "complementary":
                captioned.append(entry)
                continue
            people.append(entry)
            if backgrounds is None:
                raise UserError("its background needs a folder of backgrounds")
            wrong += _changed(backgrounds, row["background"])
            behind.append(row["background"]["file"])
        except (UserError, ValueError, KeyError, TypeError) as error:
            said = str(error) if isinstance(error, UserError) else "no case of a manifest"
            raise UserError(f"{path}, line {number}: {said}") from None
    if wrong:
        raise UserError(f"{path}: {len(wrong)} files are missing or not those listed: {'; '.join(wrong[:3])}")
    sets: dict[str, Sequence[Photo]] = {}
    if people:
        sets["coco2017"] = AnnotatedPhotos(people, photos, size)
        sets["bg20k"] = Pictures(Path(backgrounds or "."), size, behind)
    if captioned:
        sets["laion"] = AnnotatedPhotos(captioned, photos, size)
    if not sets:
        raise UserError(f"{path} is empty")
    return sets


def _shuffled(items: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    return [items[place] for place in rng.permutation(len(items))]


def _head(sort: str, number: int, prompt: str) -> Row:
    """``seed`` is that of the picture's noise."""
    return {"schema": SCHEMA, "sort": sort, "prompt": prompt, "seed": number}


def _photo(entry: Entry, folder: Path) -> Row:
    file = {"id": entry.id, "file": entry.name, "sha256": _hash(folder / entry.name)}
    return {**file, "width": entry.width, "height": entry.height}


def _entry(row: Mapping[str, Any], prompt: str) -> Entry:
    entry = Entry(row["id"], row["file"], row["width"], row["height"], [(row.get("caption", 0), prompt)])
    notes = [{**one, "num_keypoints": one["seen"]} for one in row.get("people", ())]
    entry.people, entry.knows_people = [person(note, entry) for note in notes], "people" in row
    return entry


def _changed(folder: Path, row: Mapping[str, str]) -> list[str]:
    path = folder / row["file"]
    if not path.is_file():
        return [f"there is no {path}"]
    return [] if _hash(path) == row["sha256"] else [f"{path} has another hash"]


def _hash(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()
