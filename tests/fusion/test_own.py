"""Rules of one's own from a file stand beside the others, and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from counterpoint.fusion import FUSIONS, RULES, get_fusion
from counterpoint.fusion.own import read_rules
from counterpoint.types import UserError

MINE = '''
from torch import Tensor
from counterpoint.fusion import FUSIONS
from counterpoint.types import Fusion

def loudest(features):
    """The largest of all."""
    return features.amax(0)

def scaled(by: float = 2.0):
    def rule(features):
        return by * features.sum(0)
    return rule

def with_keys():
    return Fusion("with_keys", "as cross lends them", FUSIONS["mean"].combine, keys=FUSIONS["cross"].keys)

def _helper():
    raise RuntimeError("never called")
'''


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = set(RULES)
    yield
    for name in set(RULES) - before:
        del RULES[name], FUSIONS[name]


def test_every_function_is_a_rule(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    assert read_rules(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    features = torch.randn(3, 1, 2, 4, 4)
    assert torch.equal(get_fusion("loudest").combine(features), features.amax(0))
    assert get_fusion("loudest").summary == "The largest of all."
    assert torch.equal(get_fusion("scaled:by=0.5").combine(features), 0.5 * features.sum(0))
    assert torch.equal(get_fusion("0:scaled,0.5:loudest").during(0.2).combine(features), 2 * features.sum(0))
    assert get_fusion("with_keys").keys == FUSIONS["cross"].keys
    assert {"loudest", "scaled", "with_keys"} <= set(RULES)
    assert not {"Fusion", "Tensor", "_helper"} & set(RULES)
    with pytest.raises(UserError, match="no setting 'to'; it has by"):
        get_fusion("scaled:to=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 +", "mine.py fails: SyntaxError"),
        ("import nothing_like_it", "mine.py fails: ModuleNotFoundError"),
        ("x = 1", "has no function"),
        ("def cross(features): return features[0]", "there is a rule 'cross' already"),
        ("def one(): raise ValueError('no')", "one fails: ValueError: no"),
        ("def good(f): return f[0]\ndef one(): raise ValueError('no')", "one fails: ValueError: no"),
    ],
)
def test_what_is_no_rule(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    before = set(RULES)
    with pytest.raises(UserError, match=message):
        read_rules(tmp_path / "mine.py")
    assert set(RULES) == before
    with pytest.raises(UserError, match="is no Python file"):
        read_rules(tmp_path / "nothing.py")
