"""The house: arrows, public names, what must never be imported or called, and help that needs no torch."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import counterpoint
from counterpoint.fusion import FUSIONS
from counterpoint.types import CONTROL_KINDS, DEFAULT_FUSION

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "counterpoint").rglob("*.py"))


def test_arrows_point_one_way() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_public_names() -> None:
    assert sorted(counterpoint.__all__) == [
        "FUSIONS",
        "Fusion",
        "Instance",
        "Interaction",
        "Layout",
        "Output",
        "Pipeline",
        "Reference",
        "UserError",
        "aggregate",
        "attach",
        "draw_layout",
        "load",
        "read_layout",
    ]
    for name in counterpoint.__all__:
        assert getattr(counterpoint, name).__doc__
    with pytest.raises(AttributeError, match="no attribute"):
        counterpoint.nothing  # noqa: B018


def test_version_is_stated_once() -> None:
    assert importlib.metadata.version("counterpoint") == counterpoint.__version__


def calls(tree: ast.AST) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_code_from_data(path: Path) -> None:
    """No pickle, ``eval``, ``exec`` or remote code; ``torch.load`` reads tensors only."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "torchvision"}
    assert not set(calls(tree)) & {"eval", "exec", "compile", "os.system", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        if isinstance(node, ast.keyword):
            assert node.arg not in {"trust_remote_code", "allow_pickle"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_source_is_of_readable_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_asks_whether_a_model_is_tiny() -> None:
    for path in SOURCES:
        text = path.read_text()
        if "recipes" not in path.parts and path.name not in {"load.py", "models.py"}:
            assert not re.search(r"\bif .*tiny", text), path


def test_no_torchvision_and_no_cuda_on_a_cpu_machine() -> None:
    names = {(dist.metadata["Name"] or "").lower() for dist in importlib.metadata.distributions()}
    assert "torchvision" not in names, "torchvision breaks diffusers here: something has pulled it in"
    if not torch.cuda.is_available() and "+cpu" in torch.__version__:
        assert not {name for name in names if name.startswith(("nvidia-", "triton"))}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from counterpoint.apps.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_imports_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "diffusers", "PIL", "pydantic")
    code = f"import sys; from counterpoint.apps.cli.main import app; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


VERBS = ("demo", "generate", "extract", "train", "models", "cite")


def test_help_lists_every_verb() -> None:
    text = run("--help").stdout
    for verb in VERBS:
        assert verb in text


def test_help_names_every_rule_and_the_defaults() -> None:
    text = " ".join(run("generate", "--help").stdout.split())
    for name in FUSIONS:
        assert re.search(rf"--fusion .*\b{re.escape(name)}\b", text)
    assert f"[default: {DEFAULT_FUSION}]" in text
    assert all(kind in text for kind in ("pose", "seg", "canny", "depth", "hed"))
    assert set(CONTROL_KINDS) >= {"pose", "seg", "canny", "depth", "hed", "lineart"}


def test_readme_does_not_leak_this_machine() -> None:
    places = re.compile(r"/root/|/work/|/tmp/|pypi\.org|pythonhosted|npmjs|debian\.org")
    for path in ROOT.rglob("*"):
        if (
            path.suffix in {".md", ".py", ".toml", ".yml", ".html", ".txt", ".cff"}
            and not {".venv", "runs", ".git"} & set(path.relative_to(ROOT).parts)
            and path != Path(__file__)
        ):
            assert not places.search(path.read_text()), path


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        found = page if not place else page.parent / place
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in titles}, target


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in ROOT.glob("docs/*.md") if f": {page.name}\n" not in menu]
    assert not missing
