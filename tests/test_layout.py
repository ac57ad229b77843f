"""The shape of the project: links, distributions, and which module may import which."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import qatc

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qatc"

PIPELINE = (
    *(
        "recipe",
        "numerics",
        "kernels",
        "graph",
        "passes",
        "models",
        "data",
        "ptq",
        "losses",
        "training",
        "divided",
    ),
    *("output", "runtime", "export", "evaluation", "sensitivity", "report", "quantize"),
    *("estimate", "compare", "cli"),
)
"""Packages in the order of the pipeline: one imports only those before it, and the helpers."""

HELPERS = {"errors", "machine", "progress", "storage", "testing"}
"""Import one another only."""

OFFERS = "qatc"
"""The API, ``qatc/__init__.py``: it may import all, and all may import it for the version."""

# Libraries and the packages that may import them.
_MODEL_SIDE = {*PIPELINE[PIPELINE.index("models") :]}
LIBRARIES = {
    "transformers": _MODEL_SIDE,
    "lm_eval": _MODEL_SIDE,
    "rich": {"cli"},
    "typer": {"cli"},
}
ON_GPUS = "cuda"
"""A folder of tests by itself: for GPUs, most of them on a machine that has none."""

LARGEST_PACKAGE = 12
LONGEST_FILE = 350


def package_of(module: str) -> str:
    """The package of ``qatc`` that a module is in, or the helper that it is."""
    return OFFERS if module in (OFFERS, "qatc.__main__") else module.split(".")[1]


def may_import(module: str, other: str) -> bool:
    """Whether ``module`` may import ``other``, both of qatc."""
    own, target = package_of(module), package_of(other)
    if OFFERS in (own, target) or own == target or target in HELPERS:
        return True
    known = own in PIPELINE and target in PIPELINE
    return known and PIPELINE.index(target) < PIPELINE.index(own)


def modules() -> dict[str, Path]:
    """Every module of the package, by import name; the links are followed."""
    found = {}
    for folder in (PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_symlink() and p.is_dir())):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Absolute names of the modules that ``source`` imports, inside functions as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) + is_package - node.level]
                base = ".".join([*package, *filter(None, [base])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in known else base


def violations(source: str, module: str, is_package: bool, known: set[str]) -> list[str]:
    """What ``module`` imports and may not."""
    found = []
    for name in imports(source, module, is_package, known):
        top = name.split(".")[0]
        if top == "qatc":
            if not may_import(module, name):
                found.append(f"{module} imports {name}")
        elif package_of(module) not in LIBRARIES.get(top, {package_of(module)}):
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("name", ["passes", "cli"])
def test_link_leads_to_the_folder_at_the_top(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink(), f"{link} is no link: check out with core.symlinks=true"
    assert link.readlink() == Path("..", name)
    module = importlib.import_module(f"qatc.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


def test_every_module_has_a_place() -> None:
    unknown = {package_of(name) for name in modules()} - {*PIPELINE, *HELPERS, OFFERS}
    assert not unknown, f"add to PIPELINE in {Path(__file__).name}: {', '.join(sorted(unknown))}"


def test_every_package_says_what_it_is_for_and_is_no_attic() -> None:
    for package in (*PIPELINE, "machine", "storage"):
        folder = PACKAGE / package
        purpose = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert purpose and purpose.splitlines()[0].endswith("."), package
        files = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(files) <= LARGEST_PACKAGE, f"{package} has {len(files)} files"


def test_tests_stand_as_what_they_test_does() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    assert folders <= {*PIPELINE, *HELPERS, ON_GPUS}


@pytest.mark.parametrize("folder", ["qatc", "passes", "cli", "tests", "examples", "benchmarks"])
def test_no_file_is_too_long_to_read_at_once(folder: str) -> None:
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    too_long = [f"{path}: {n} lines" for path, n in lengths.items() if n > LONGEST_FILE]
    assert not too_long, f"split by topic what has over {LONGEST_FILE}:\n" + "\n".join(too_long)


@pytest.mark.parametrize("package", PIPELINE)
def test_packages_are_found_through_the_links(package: str) -> None:
    assert any(name.startswith(f"qatc.{package}.") for name in modules())


def test_packages_import_only_those_before_them() -> None:
    found = modules()
    wrong = [
        line
        for module, path in sorted(found.items())
        for line in violations(
            path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(found)
        )
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qatc.numerics.minmax", "from qatc.graph.nodes import find_linears"),
        ("qatc.numerics.minmax", "from qatc.graph import nodes"),
        ("qatc.numerics.minmax", "import qatc.graph.nodes"),
        ("qatc.numerics.minmax", "from ..graph.nodes import find_linears"),
        ("qatc.numerics.minmax", "from qatc.unheard_of import thing"),
        ("qatc.storage.files", "from qatc.recipe.spec import QuantSpec"),
        ("qatc.passes.some_pass", "from qatc.models.load import load_model"),
        ("qatc.passes.some_pass", "from ..models import load"),
        ("qatc.passes.some_pass", "def late():\n    import transformers.models"),
        ("qatc.passes.some_pass", "from lm_eval import tasks"),
        ("qatc.report.plan", "from rich.table import Table"),
        ("qatc.report.plan", "import typer"),
        ("qatc.report.plan", "from qatc.cli import main"),
    ],
)
def test_an_import_from_further_down_is_noticed(module: str, source: str) -> None:
    known = {"qatc.graph.nodes", "qatc.models.load", "qatc.cli.main"}
    assert len(violations(source, module, False, known)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qatc.graph.nodes", "from qatc.numerics import minmax"),
        ("qatc.graph.nodes", "from qatc.graph.capture import Template"),
        ("qatc.passes.some_pass", "from qatc.passes.base import GraphPass\nimport torch"),
        ("qatc.report.plan", "import transformers"),
        ("qatc.cli.main", "import rich, typer\nfrom qatc import Recipe"),
        ("qatc.models.load", "from qatc.storage import files\nfrom qatc.errors import QatcError"),
    ],
)
def test_an_import_from_further_up_is_fine(module: str, source: str) -> None:
    assert violations(source, module, False, {"qatc.numerics.minmax"}) == []


def run(*command: str, cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "import qatc",
        "import qatc.errors, qatc.recipe.spec, qatc.recipe.recipe, qatc.storage.files",
        "import sys; sys.argv = ['qatc', '--help']; from qatc.cli.main import main; main()",
    ],
)
def test_no_torch_until_it_is_needed(code: str) -> None:
    at_exit = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))\n"
    done = run(sys.executable, "-c", at_exit + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", ["passes", "cli"])
@pytest.mark.parametrize("statement", ["import {0}", "from {0} import x", "import {0}.x"])
def test_ruff_refuses_the_second_name_of_a_package(name: str, statement: str) -> None:
    source = statement.format(name) + "\n"
    done = run(
        *(sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID"),
        *("--stdin-filename", "qatc/some_module.py", "-"),
        stdin=source,
    )
    assert done.returncode == 1, done.stderr
    assert "TID251" in done.stdout and f"qatc.{name}" in done.stdout


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == qatc.__version__


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    """Built through the sdist, as a release is, from a copy, so that no old build gets in."""
    tree, dist = tmp_path / "tree", tmp_path / "dist"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("qatc", "passes", "cli"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {str(path.relative_to(ROOT)) for path in modules().values()} <= held
    assert {"qatc/py.typed", "qatc/passes/__init__.py", "qatc/cli/__init__.py"} <= held
    assert not [name for name in held if name.startswith(("passes/", "cli/", "tests/"))]


def test_no_public_name_is_also_a_module() -> None:
    """Importing ``qatc.name`` would put the module in the place of the public function."""
    assert not {f"qatc.{name}" for name in qatc.__all__} & set(modules())
