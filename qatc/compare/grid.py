"""A grid file, and the cells that it spells out: one run of ``qatc quantize`` each."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatc.errors import ConfigError
from qatc.storage.files import read_yaml

DATA_OPTIONS = (
    *("model", "samples", "max-length", "strategy", "turns", "greedy-tokens", "seed"),
    *("generation-batch-size", "dtype", "device", "compile"),
)
"""Options that decide the bytes of a corpus; cells in which all of them agree share one."""

SET_BY_THE_GRID = ("config", "config-file", "json", "output", "overwrite", "resume")
"""Options of ``qatc quantize`` that a grid file cannot set: the grid itself does."""

EVALUATIONS = {
    "text": ("text", "length", "max-tokens", "batch-size"),
    "tasks": (
        *("tasks", "include-path", "limit", "num-fewshot", "runtime", "length", "batch-size"),
    ),
}
"""Options of ``qatc evaluate`` that a grid file can set, for either kind of evaluation."""

_IN_NAMES = ("bits", "method", "preset", "kv-range", "budget", "loss", "strategy", "group-size")
_ALWAYS = ("bits", "method")
_KEYS = ("base", "seeds", "evaluate", "grids")
_KEYS_OF_A_TABLE = ("name", "base", "axes", "seeds", "evaluate")


@dataclass(frozen=True)
class Cell:
    """One run of ``qatc quantize``.

    Attributes:
        table: name of the grid that it is in.
        options: of the command, by name as in a run file; ``seed`` is among them.
        defaults: of the command, by the same names. A cell that spells one out is the same as one
            that leaves it away.
        evaluations: what it is measured on besides its own corpus: options of ``qatc evaluate``.
    """

    table: str
    options: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    evaluations: tuple[Mapping[str, Any], ...] = ()

    @property
    def seed(self) -> int:
        """Seed of all that is drawn."""
        return int(self.options["seed"])

    @property
    def setting(self) -> dict[str, Any]:
        """What the cell has in common with its repetitions: the options but for the seed."""
        return {name: value for name, value in self.options.items() if name != "seed"}

    @property
    def name(self) -> str:
        """Of its directory: readable, and another one for other options."""
        shown = [Path(str(self.options["model"])).name]
        named = {**{n: self.defaults[n] for n in _ALWAYS if n in self.defaults}, **self._own}
        shown += [str(named[name]) for name in _IN_NAMES if name in named]
        readable = re.sub(r"[^\w.+-]+", "_", "-".join([*shown, f"seed{self.seed}"]))
        return f"{readable[:100]}-{fingerprint(self._own)}"

    @property
    def corpus(self) -> str:
        """Name of the directory of its corpus, the same for all cells with the same data."""
        return fingerprint({n: self._own[n] for n in DATA_OPTIONS if n in self._own})

    @property
    def _own(self) -> dict[str, Any]:
        """The options that are not the default."""
        return {
            n: v for n, v in self.options.items() if n not in self.defaults or v != self.defaults[n]
        }


def fingerprint(options: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the SHA-256 of the options, in whatever order."""
    plain = json.dumps(options, sort_keys=True, default=str)
    return hashlib.sha256(plain.encode()).hexdigest()[:10]


def read_grid(path: Path, known: Mapping[str, Any]) -> list[Cell]:
    """The cells of a grid file, in its order.

    Args:
        path: YAML with ``base`` (options of all cells), ``seeds``, ``evaluate`` (a list of options
            of ``qatc evaluate``), and ``grids``: a list of tables with ``name``, ``base``,
            ``seeds``, ``evaluate`` and ``axes`` (option -> list of values, of which every
            combination is a cell).
        known: names of the options of ``qatc quantize``, with their defaults; None is none.

    Raises:
        ConfigError: the file cannot be read, or says something that is no grid.
    """
    plain = read_yaml(path, "the grid file", f"holds no grid; it takes the keys {', '.join(_KEYS)}")
    _refuse_unknown(plain, _KEYS, f"{path}")
    tables = plain.get("grids")
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path}: grids takes a list of tables, such as '- axes: {{bits: [..]}}'")
    defaults = {n.replace("_", "-"): value for n, value in known.items() if value is not None}
    cells: list[Cell] = []
    for number, table in enumerate(tables, start=1):
        where = f"{path}, table {number}"
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where} is not a mapping; it takes {', '.join(_KEYS_OF_A_TABLE)}")
        _refuse_unknown(table, _KEYS_OF_A_TABLE, where)
        name = str(table.get("name", f"table {number}"))
        if any(cell.table == name for cell in cells):
            raise ConfigError(f"{where}: there is a table {name!r} already; give it another name")
        base = {**_options(plain, "base", known, path), **_options(table, "base", known, where)}
        seeds = _seeds(table.get("seeds", plain.get("seeds", [0])), where)
        axes = _options(table, "axes", known, where)
        asked = _evaluations(table.get("evaluate", plain.get("evaluate")), where)
        cells += [
            Cell(name, own, defaults, asked) for own in _combinations(base, axes, seeds, where)
        ]
    return cells


def _evaluations(plain: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Options of ``qatc evaluate``, by names with dashes."""
    entries = [] if plain is None else plain
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(
            f"{where}: evaluate takes a list of options of qatc evaluate, such as"
            f" '- text: wiki.txt' or '- tasks: paper'; got {plain!r}"
        )
    found = []
    for entry in entries:
        options = {str(name).replace("_", "-"): value for name, value in entry.items()}
        options = {name: value for name, value in options.items() if value is not None}
        if ("text" in options) == ("tasks" in options):
            raise ConfigError(f"{where}: an entry of evaluate takes text or tasks; got {entry!r}")
        kind = "text" if "text" in options else "tasks"
        _refuse_unknown(options, EVALUATIONS[kind], f"{where}, evaluate, {kind}")
        if kind == "text" and not Path(str(options["text"])).is_file():
            raise ConfigError(f"{where}: there is no text {options['text']} to evaluate on")
        found.append(options)
    names = [Path(str(options["text"])).name for options in found if "text" in options]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"{where}: two texts to evaluate on are called {twice[0]}, which is how the tables call"
            " them; rename one, or give it to another table"
        )
    return tuple(found)


def _combinations(
    base: Mapping[str, Any], axes: Mapping[str, Any], seeds: list[int], where: str
) -> Iterator[dict[str, Any]]:
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: the axis {name} takes a list of values; got {values!r}")
    for values in itertools.product(*axes.values(), seeds):
        options = {**base, **dict(zip([*axes, "seed"], values, strict=True))}
        options = {name: value for name, value in options.items() if value is not None}
        if "model" not in options:
            raise ConfigError(f"{where} names no model; put 'model: DIR' into base")
        yield options


def _options(
    plain: Mapping[Any, Any], key: str, known: Collection[str], where: object
) -> dict[str, Any]:
    """Options that stand under ``key``, by names with dashes."""
    found = plain.get(key) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: {key} is not a mapping of options; got {found!r}")
    options = {str(name).replace("_", "-"): value for name, value in found.items()}
    for name in options:
        if name in SET_BY_THE_GRID:
            raise ConfigError(f"{where}: qatc compare sets {name} itself; leave it out of {key}")
    if "seed" in options:
        raise ConfigError(f"{where}: seeds are listed beside {key}: 'seeds: [0, 1, 2]'")
    names = {name.replace("_", "-") for name in known} - {*SET_BY_THE_GRID, "seed"}
    _refuse_unknown(options, names, f"{where}, {key}")
    return options


def _refuse_unknown(plain: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for name in plain:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1) or sorted(known)
            raise ConfigError(f"{where}: there is no {str(name)!r}; there is {', '.join(near)}")


def _seeds(plain: Any, where: str) -> list[int]:
    whole = isinstance(plain, list) and all(type(seed) is int for seed in plain)
    if not whole or not plain or len(set(plain)) < len(plain):
        raise ConfigError(f"{where}: seeds takes a list of different whole numbers; got {plain!r}")
    return list(plain)
