"""What is built is what is here: the wheel and the sdist hold every module of the tree and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("adapters", "engines", "finetune", "server", "storage")
BESIDE_CODE = ("README.md", "LICENSE", "pyproject.toml")


def modules() -> set[str]:
    """All files below the package folders, relative to the root: there is no data among them, only modules."""
    found = {"__init__.py"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(path.relative_to(ROOT).as_posix())
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the wheel and the sdist, built from a copy of the tree as a release would be."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    for name in (*BESIDE_CODE, "__init__.py"):
        shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", str(folder / "dist")]
    result = subprocess.run([*command, str(tree)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    yield folder / "dist"
    shutil.rmtree(folder)


def test_the_tree_holds_modules_only() -> None:
    assert {name for name in modules() if not name.endswith(".py")} == set()


def test_every_folder_is_a_listed_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = sorted({Path(name).parent.as_posix() for name in modules()})
    expected = ["tuneloop" if folder == "." else "tuneloop." + folder.replace("/", ".") for folder in folders]
    assert settings["packages"] == expected


def test_the_wheel_is_the_tree(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {f"tuneloop/{name}" for name in modules()}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_has_the_command_and_the_migrations(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "tuneloop = tuneloop.server.cli:main" in archive.read(entry_points).decode()
    scripts = sorted((ROOT / "storage/migrations/versions").glob("v*.py"))
    assert scripts
    assert {f"tuneloop/storage/migrations/versions/{script.name}" for script in scripts} <= set(names)


def test_the_sdist_is_the_tree(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if "/" in name}
        files = {name for name in names if archive.getmember(f"{sdist.name.removesuffix('.tar.gz')}/{name}").isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in files - made if ".egg-info/" not in name} == modules() | set(BESIDE_CODE)


def test_the_root_has_no_other_module() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_typings_show_type_checkers_the_whole_package() -> None:
    typings = ROOT / "typings" / "tuneloop"
    links = {path.name: path.resolve() for path in typings.iterdir() if path.is_symlink()}
    assert links == {name: ROOT / name for name in ("__init__.py", *FOLDERS)}
