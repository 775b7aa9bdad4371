"""Tables of photos: Parquet files as the hub publishes them, and data sets that the datasets library saved."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar

from counterpoint.data.photos import ALL, DOWNLOAD, SEGMENTS, Photo, decode_photo, pictured
from counterpoint.types import UserError

MOST_CACHED = 512 * 2**20
"""Bytes of row groups that a process keeps: a shuffled order asks for one again and again."""
_NEEDS = "{} needs {}: pip install 'counterpoint[data]'"


def parquet(
    folder: Path,
    size: int,
    text: str = "text",
    maps: Mapping[str, str] | None = None,
    split: str = "train",
    *,
    image: str = "image",
    kinds: Collection[str] = ALL,
) -> Columns:
    """Rows of a split: ``data/SPLIT-*.parquet``.

    Args:
        folder: of the data set.
        size: to which pictures are brought.
        text: column of the caption.
        maps: kind -> column of its condition image, ``segments`` -> column of their numbers, which may be missing;
            default whatever columns are called ``KIND`` or ``control_KIND``, ``segments`` or ``seg_map``.
        split: as published.
        image: column of the picture.
        kinds: of the condition images, where their columns are not named.

    Raises:
        UserError: no file, no pyarrow, or no such column.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(_NEEDS.format("a Parquet file", "pyarrow")) from None
    paths = sorted((folder / "data").glob(f"{split}-*.parquet"))
    if not paths:
        raise UserError(f"{folder} lacks data/{split}-*.parquet: download the data set's {split} split")
    try:
        files = [pyarrow.parquet.ParquetFile(path, memory_map=True) for path in paths]
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{folder}: a Parquet file is cut or none: {str(error).splitlines()[0]}") from None
    schema = files[0].schema_arrow
    found = _maps(schema.names, kinds) if maps is None else maps
    pictures = [name for name in schema.names if str(schema.field(name).type).startswith("struct")]
    if found.get(SEGMENTS) not in pictures:
        found = {kind: column for kind, column in found.items() if kind != SEGMENTS}
    columns = (image, text, *found.values())
    for path, file in zip(paths, files, strict=True):
        _check(str(path), columns, file.schema_arrow.names)
    groups = [
        _Group(path, file, group, columns, file.metadata.row_group(group).num_rows)
        for path, file in zip(paths, files, strict=True)
        for group in range(file.num_row_groups)
    ]
    return Columns(_Joined(groups), size, text, found, image)


def saved_dataset(
    folder: Path,
    size: int,
    text: str = "text",
    maps: Mapping[str, str] | None = None,
    *,
    image: str = "image",
    kinds: Collection[str] = ALL,
) -> Columns:
    """What ``datasets.Dataset.save_to_disk`` wrote; of several splits, ``train``. Columns as for :func:`parquet`.

    Raises:
        UserError: it is none, or has no pictures or captions.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(_NEEDS.format("a saved data set", "datasets")) from None
    try:
        rows = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no saved data set: {str(error).splitlines()[0]}") from None
    if isinstance(rows, datasets.DatasetDict):
        if "train" not in rows:
            raise UserError(f"{folder} has no split train; it has {', '.join(rows)}")
        rows = rows["train"]
    found = _maps(rows.column_names, kinds) if maps is None else dict(maps)
    if not isinstance(rows.features.get(found.get(SEGMENTS)), datasets.Image):
        found.pop(SEGMENTS, None)
    _check(str(folder), (image, text, *found.values()), rows.column_names)
    for column in (image, *found.values()):
        rows = rows.cast_column(column, datasets.Image(decode=False))  # decoded here, where damage is counted
    return Columns(_Saved(rows), size, text, found, image)


def table_reader(place: Path) -> Callable[..., Columns] | None:
    """What reads the table that a folder holds, if it holds one."""
    if (place / "dataset_dict.json").exists() or (place / "dataset_info.json").exists():
        return saved_dataset
    return parquet if any(place.glob("data/*.parquet")) else None


class Columns:
    """Rows of a table as photos, by the names of their columns.

    Args:
        rows: number -> row, in which a cell of a picture is ``{"bytes": ...}``, and which rows have a column's.
        size: to which pictures are brought.
        text: column of the caption.
        maps: kind -> column of its condition image.
        image: column of the picture.
    """

    def __init__(
        self, rows: _Joined | _Saved, size: int, text: str, maps: Mapping[str, str], image: str = "image"
    ) -> None:
        self.rows, self.size, self.text, self.maps, self.image = rows, size, text, dict(maps), image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Photo:
        row, where = self.rows[number], f"row {number}"
        files = {kind: _content(row[column], where) for kind, column in self.maps.items() if row[column] is not None}
        text = row[self.text] or ""
        if not isinstance(text, str):
            raise UserError(f"{where}: the caption in {self.text} is no text")
        return decode_photo(where, _content(row[self.image], where), text, files, self.size)

    def having(self, kind: str) -> list[int]:
        """The numbers of the rows with a condition image of a kind."""
        return self.rows.having(self.maps[kind]) if kind in self.maps else []


class _Saved:
    """The rows of a data set of the datasets library."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]

    def having(self, column: str) -> list[int]:
        tables = self.rows.select_columns([column]).with_format("arrow").iter(1000)
        return [number for number, there in enumerate(chain.from_iterable(map(_filled, tables))) if there]


class _Joined:
    """Several groups of rows as one."""

    def __init__(self, parts: Sequence[_Group]) -> None:
        self.parts, self.ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, number: int) -> Any:
        part = bisect_right(self.ends, number)
        return self.parts[part][number - (self.ends[part - 1] if part else 0)]

    def having(self, column: str) -> list[int]:
        there = chain.from_iterable(part.having(column) for part in self.parts)
        return [number for number, one in enumerate(there) if one]


class _Group:
    """The rows of a row group, which is read as a whole; what was read last is kept for others that need it."""

    cached: ClassVar[OrderedDict[tuple[Path, int, tuple[str, ...]], Any]] = OrderedDict()

    def __init__(self, path: Path, file: Any, group: int, columns: tuple[str, ...], length: int) -> None:
        self.path, self.file, self.group, self.columns, self.length = path, file, group, columns, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._read().slice(number, 1).to_pylist()[0]

    def having(self, column: str) -> Sequence[bool]:
        """Whether each row has a picture there; a group that counted no gap is not read."""
        metadata = self.file.metadata.row_group(self.group)
        columns = (metadata.column(number) for number in range(metadata.num_columns))
        gaps = next((one.statistics for one in columns if one.path_in_schema == f"{column}.bytes"), None)
        if gaps is not None and gaps.has_null_count and not gaps.null_count:
            return [True] * self.length
        return _filled(self.file.read_row_group(self.group, [column]))

    def _read(self) -> Any:
        key = self.path, self.group, self.columns
        if key not in self.cached:
            try:
                self.cached[key] = self.file.read_row_group(self.group, list(self.columns))
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{self.path}: row group {self.group} is damaged: {reason}") from None
        self.cached.move_to_end(key)
        while len(self.cached) > 1 and sum(table.nbytes for table in self.cached.values()) > MOST_CACHED:
            self.cached.popitem(last=False)
        return self.cached[key]


def _filled(table: Any) -> list[bool]:
    """Whether each row of a table's only column holds a picture."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(table.column(0), "bytes").is_valid().to_pylist()


def _maps(columns: Sequence[str], kinds: Collection[str]) -> dict[str, str]:
    """Kind, or segments -> the column that is called after it."""
    names = {kind: (kind, f"control_{kind}") for kind in pictured(kinds)} | {SEGMENTS: (SEGMENTS, "seg_map")}
    return {kind: name for kind, called in names.items() for name in called if name in columns}


def _check(where: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    if not set(wanted[:1]) & set(there) and {"url", "text"} <= {name.lower() for name in there}:
        raise UserError(f"{where} has no pictures; {DOWNLOAD}")
    if absent := sorted(set(wanted) - set(there)):
        raise UserError(f"{where} has no column {', '.join(absent)}; it has {', '.join(there)}")


def _content(cell: Any, where: str) -> bytes:
    if not (isinstance(cell, Mapping) and cell.get("bytes")):
        raise UserError(f"{where} holds no picture")
    return cell["bytes"]
