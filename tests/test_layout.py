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

# A module may import from its own layer and from lower ones. A package stands for all modules in
# it; "qatc" alone is qatc/__init__.py, which offers the API of layer 5.
LAYERS = {
    "qatc.cpu": 1,
    "qatc.directories": 1,
    "qatc.errors": 1,
    "qatc.files": 1,
    "qatc.locks": 1,
    "qatc.markers": 1,
    "qatc.signals": 1,
    "qatc.spec": 1,
    "qatc.compilation": 2,
    "qatc.embedding": 2,
    "qatc.graph": 2,
    "qatc.integer": 2,
    "qatc.kernels": 2,
    "qatc.kv_cache": 2,
    "qatc.native": 2,
    "qatc.ops": 2,
    "qatc.packing": 2,
    "qatc.products": 2,
    "qatc.row_attention": 2,
    "qatc.program": 2,
    "qatc.translation": 2,
    "qatc.passes": 3,
    "qatc.capture": 4,
    "qatc.causality": 4,
    "qatc.constants": 4,
    "qatc.decode": 4,
    "qatc.device": 4,
    "qatc.models": 4,
    "qatc.preparation": 4,
    "qatc.probes": 4,
    "qatc.recipe": 4,
    "qatc.structure": 4,
    "qatc.targets": 1,
    "qatc.toolchain": 1,
    "qatc.templates": 4,
    "qatc.traces": 4,
    "qatc.vocabulary": 4,
    "qatc": 5,
    "qatc.assess": 5,
    "qatc.checkpoint": 5,
    "qatc.checks": 5,
    "qatc.data": 5,
    "qatc.decode_program": 5,
    "qatc.distill": 5,
    "qatc.estimate": 5,
    "qatc.end_parity": 5,
    "qatc.evaluate": 5,
    "qatc.export": 5,
    "qatc.float_head": 4,
    "qatc.forced": 5,
    "qatc.generate": 5,
    "qatc.global_parity": 5,
    "qatc.inspect": 5,
    "qatc.local_parity": 5,
    "qatc.losses": 5,
    "qatc.model_card": 5,
    "qatc.packed_cache": 5,
    "qatc.parity": 5,
    "qatc.progress": 5,
    "qatc.quantize": 5,
    "qatc.report": 5,
    "qatc.runtime": 5,
    "qatc.saving": 5,
    "qatc.sampling": 2,
    "qatc.settings": 5,
    "qatc.slots": 5,
    "qatc.testing": 5,
    "qatc.text_stream": 5,
    "qatc.usage": 5,
    "qatc.writing": 5,
    "qatc.cli": 6,
}
PACKAGES = {"qatc.cli", "qatc.export", "qatc.models", "qatc.passes"}

# Libraries and the layers that may import them.
LIBRARIES = {
    "transformers": {4, 5, 6},
    "lm_eval": {4, 5, 6},
    "rich": {6},
    "typer": {6},
}


def layer_of(module: str) -> int | None:
    """Layer of a module, or None if the table does not know it."""
    package = ".".join(module.split(".")[:2])
    return LAYERS.get(package if package in PACKAGES else module)


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
    layer = layer_of(module)
    assert layer is not None
    found = []
    for name in imports(source, module, is_package, known):
        if name.split(".")[0] == "qatc":
            target = layer_of(name)
            if target is None or target > layer:
                found.append(f"{module} (layer {layer}) imports {name} (layer {target})")
        elif layer not in LIBRARIES.get(name.split(".")[0], {layer}):
            found.append(f"{module} (layer {layer}) imports {name}")
    return found


@pytest.mark.parametrize("name", ["passes", "cli"])
def test_link_leads_to_the_folder_at_the_top(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink(), f"{link} is no link: check out with core.symlinks=true"
    assert link.readlink() == Path("..", name)
    module = importlib.import_module(f"qatc.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


def test_every_module_has_a_layer() -> None:
    unknown = [name for name in modules() if layer_of(name) is None]
    assert not unknown, f"add to LAYERS in {Path(__file__).name}: {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_are_found_through_the_links(package: str) -> None:
    assert any(name.startswith(package) for name in modules())


def test_modules_import_only_from_their_own_or_lower_layers() -> None:
    found = modules()
    wrong = [
        line
        for module, path in sorted(found.items())
        if layer_of(module) is not None
        for line in violations(
            path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(found)
        )
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qatc.ops", "from qatc.recipe import Recipe"),
        ("qatc.ops", "from qatc import recipe"),
        ("qatc.ops", "import qatc.recipe"),
        ("qatc.ops", "import qatc"),
        ("qatc.ops", "from . import recipe"),
        ("qatc.ops", "from .recipe import Recipe"),
        ("qatc.ops", "from qatc.unheard_of import thing"),
        ("qatc.passes.some_pass", "from qatc.recipe import Recipe"),
        ("qatc.passes.some_pass", "from ..recipe import Recipe"),
        ("qatc.passes.some_pass", "def late():\n    import transformers.models"),
        ("qatc.passes.some_pass", "from lm_eval import tasks"),
        ("qatc.report", "from rich.table import Table"),
        ("qatc.report", "import typer"),
        ("qatc.report", "from qatc.cli import main"),
    ],
)
def test_an_import_from_a_higher_layer_is_noticed(module: str, source: str) -> None:
    assert len(violations(source, module, False, {"qatc.recipe", "qatc.cli.main"})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qatc.graph", "from qatc import ops"),
        ("qatc.passes.some_pass", "from qatc.passes.base import GraphPass\nimport torch"),
        ("qatc.report", "import transformers"),
        ("qatc.cli.main", "import rich, typer\nfrom qatc import Recipe"),
    ],
)
def test_an_import_from_a_lower_layer_is_fine(module: str, source: str) -> None:
    assert violations(source, module, False, {"qatc.ops"}) == []


def run(*command: str, cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "import qatc",
        "import qatc.errors, qatc.spec, qatc.recipe, qatc.files",
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
