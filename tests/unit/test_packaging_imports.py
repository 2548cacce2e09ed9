"""Imports run downwards only, stay relative, and leave the heavy frameworks to the processes that need them."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("server", "finetune", "engines", "adapters", "storage")  # each may import what stands to its right
HTTP = frozenset({"fastapi", "starlette", "sse_starlette", "uvicorn"})
HEAVY = ("torch", "transformers", "vllm", "peft", "accelerate")
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it: `tuneloop.engines.base`, `fastapi`."""
    package = ["tuneloop", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import x` may mean the module x as well as a name in the package
            yield from (f"{stem}.{name.name}" for name in node.names)


def is_absolute_self_import(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(name.name.split(".")[0] == "tuneloop" for name in node.names)
    return isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "tuneloop"


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_downwards(layer: str) -> None:
    above = LAYERS[: LAYERS.index(layer)]
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == layer
        for name in imported(path)
        if name.split(".")[0] == "tuneloop" and len(name.split(".")) > 1 and name.split(".")[1] in above
    ]
    assert upward == []


def test_nothing_below_the_server_knows_http() -> None:
    guilty = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] != "server"
        for name in imported(path)
        if name.split(".")[0] in HTTP
    ]
    assert guilty == []


def test_the_package_imports_itself_relatively() -> None:
    # An absolute import would name whatever tuneloop is installed, not the tree that the importing file belongs to.
    # Alembic runs env.py as a file outside of any package, where relative imports have nothing to start from.
    guilty = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path != ROOT / "storage/migrations/env.py"
        and any(is_absolute_self_import(node) for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    ]
    assert guilty == []


SERVER_ONLY = ("sqlalchemy", "alembic", "fsspec", *HTTP)


def loaded_by(module: str, names: Sequence[str]) -> list[str]:
    """Which of the names are imported once `module` is, in a fresh interpreter."""
    code = f"import sys, {module}; print(*sorted(set({names!r}) & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("module", ["tuneloop.server", "tuneloop.server.app", "tuneloop.server.cli"])
def test_the_server_process_stays_light(module: str) -> None:
    assert loaded_by(module, HEAVY) == []


@pytest.mark.parametrize("module", ["tuneloop.engines.transformers.worker", "tuneloop.engines.sources.worker"])
def test_workers_import_nothing_of_the_server_and_the_commands(module: str) -> None:
    # Each would lengthen the way to the first answer, and stay in the memory of every worker.
    assert loaded_by(module, SERVER_ONLY) == []
