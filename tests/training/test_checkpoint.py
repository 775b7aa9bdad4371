"""Checkpoints: whole or ignored, and never fewer good ones than before."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from counterpoint.training.checkpoint import MARKER, CheckpointError, found, newest, save, verify


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "a.bin").write_text(text)
        (folder / "b.bin").write_text(text * 2)

    return write


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 100):
        save(tmp_path, step, writer(str(step)), keep=2)
    assert [step for step, _ in found(tmp_path)] == [20, 100]
    assert verify(newest(tmp_path, print)) == 100


def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 10, writer("x"), keep=1)

    def full(folder: Path) -> None:
        (folder / "a.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 20, full, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert verify(newest(tmp_path, print)) == 10


def test_a_step_saved_twice_stays_when_the_second_time_fails(tmp_path: Path) -> None:
    save(tmp_path, 10, writer("x"), keep=1)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 10, full, keep=1)
    assert (newest(tmp_path, print) / "a.bin").read_text() == "x"
    assert (save(tmp_path, 10, writer("y"), keep=1) / "a.bin").read_text() == "y"
    assert verify(newest(tmp_path, print)) == 10


@pytest.mark.parametrize("where", ["marker", "rename", "write"])
def test_killed_at_any_point(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves the files as they are: simulate it by making cleaning up impossible too."""
    save(tmp_path, 10, writer("x"), keep=1)
    monkeypatch.setattr("counterpoint.training.checkpoint.shutil.rmtree", lambda *_, **__: None)
    write_text, rename = Path.write_text, Path.rename

    def half_written(self: Path, text: str) -> int:
        if where == "marker" and self.name == MARKER:
            write_text(self, text[:10])
            raise KeyboardInterrupt
        return write_text(self, text)

    def not_renamed(self: Path, target: Path) -> Path:
        if where == "rename" and target.name == "checkpoint-20":
            raise KeyboardInterrupt
        return rename(self, target)

    def killed(folder: Path) -> None:
        (folder / "a.bin").write_text("half")
        if where == "write":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half_written)
    monkeypatch.setattr(Path, "rename", not_renamed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20, killed, keep=1)
    monkeypatch.undo()
    assert verify(newest(tmp_path, print)) == 10
    save(tmp_path, 20, writer("y"), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20"]


def test_damaged_newest_falls_back_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, 10, writer("x"), keep=2)
    path = save(tmp_path, 20, writer("y"), keep=2)
    (path / "a.bin").write_text("")
    said: list[str] = []
    assert verify(newest(tmp_path, said.append)) == 10
    assert "checkpoint-20" in said[0]
    assert "a.bin" in said[0]


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        newest(tmp_path / "typo", print)
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(CheckpointError, match="marker"):
        verify(tmp_path / "checkpoint-5")


@pytest.mark.parametrize("where", ["write", "before", "rename", "after"])
def test_a_step_saved_twice_is_there_whenever_it_is_killed(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10, writer("x"), keep=1)
    rename, remove = Path.rename, shutil.rmtree

    def killed(self: Path, target: Path) -> Path:
        if where == {"checkpoint-10.before": "before", "checkpoint-10": "rename"}[target.name]:
            raise KeyboardInterrupt
        return rename(self, target)

    def left(path: Path, **_: object) -> None:
        if where == "after" and path.name == "checkpoint-10.before" and path.exists():
            raise KeyboardInterrupt

    def write(folder: Path) -> None:
        writer("y")(folder)
        if where == "write":
            raise KeyboardInterrupt

    monkeypatch.setattr("counterpoint.training.checkpoint.shutil.rmtree", left)
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, write, keep=1)
    monkeypatch.undo()
    assert shutil.rmtree is remove
    found = newest(tmp_path, print)
    assert verify(found) == 10
    assert (found / "a.bin").read_text() == ("y" if where == "after" else "x")
    save(tmp_path, 10, writer("z"), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10"]
