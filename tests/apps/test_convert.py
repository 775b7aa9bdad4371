"""Pickles become safetensors, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


class Trap:
    """Creates a file when it is unpickled carelessly."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("sprung",)


def test_tensors_come_over(cli, tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    torch.save({"state_dict": {"a": shared, "b": shared.t(), "step": 3}}, tmp_path / "model.ckpt")
    status, said, _ = cli("models", "convert", "model.ckpt", "--trust-pickle")
    assert status == 0
    assert "2 tensors" in said
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["a"], shared)
    assert torch.equal(read["b"], shared.t())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.pth",), "say --trust-pickle"),
        (("trap.pth", "--trust-pickle"), "something other than tensors"),
        (("cut.pth", "--trust-pickle"), "damaged"),
        (("none.pth", "--trust-pickle"), "there is no file none.pth"),
        (("number.pth", "--trust-pickle"), "no named tensors"),
        (("model.pth", "out.bin", "--trust-pickle"), "ends in .safetensors"),
        (("model.pth", "there.safetensors", "--trust-pickle"), "is there already"),
    ],
)
def test_what_is_refused(cli, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pth")
    torch.save(3, tmp_path / "number.pth")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:-50])
    (tmp_path / "there.safetensors").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    status, _, message = cli("models", "convert", *arguments)
    assert status == 2
    assert said in message
    assert len(message.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
