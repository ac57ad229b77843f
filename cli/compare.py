"""``qatc compare``."""

from __future__ import annotations

import os
import re
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.cli.quantize import quantize
from qatc.errors import ConfigError, QatcError


def compare(
    grid: Annotated[Path, typer.Argument(help="YAML file of options and lists of their values.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write. Default: GRID-results here.", show_default=False),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: run only the cells whose number modulo n is i. Default: RANK and WORLD_SIZE"
            " as torchrun sets them, or all.",
            show_default=False,
        ),
    ] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the weights of every cell.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and run none.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Run qatc quantize for every cell of a grid, and set the results side by side.

    A grid that was interrupted goes on when the same command is given again; finished cells are not
    run again. It ends with 1 if a cell failed.

    [bold]Examples[/]

      qatc compare examples/paper/small.yaml --output small

      torchrun --nproc-per-node 8 --no-python qatc compare grid.yaml
    """
    from qatc.cli import terminal

    with readable_errors("interrupted; the same command goes on from here"):
        from qatc.compare.grid import read_grid
        from qatc.compare.running import failures, run_cells, unique

        cells = read_grid(grid, quantize_options())
        part = _shard(shard)
        out = output or Path(f"{grid.stem}-results")
        if dry_run:
            for cell in unique(cells)[part[0] :: part[1]]:
                terminal.out.print(cell.name, highlight=False)
            return
        terminal.quiet_libraries()
        from qatc.compare.results import write_results
        from qatc.compare.summary import cells_of, tables

        with terminal.RunDisplay().live() as display:
            run_cells(cells, out, shard=part, keep_models=keep_models, observer=display)
        failed = failures(cells, out)
        rows = write_results(cells, out)
        if rows is None:
            terminal.note(
                f"{out}: cells of other shards have not ended; the last one writes tables"
            )
        elif json:
            terminal.print_json(
                {"output": str(out), "rows": [row.to_dict() for row in rows], "failed": failed}
            )
        else:
            for name, own in tables(rows).items():
                terminal.print_table(cells_of(own, brief=True), title=name)
            terminal.out.print(f"page  {out / 'compare.html'}", highlight=False)
        if failed:
            raise QatcError(
                f"{len(failed)} of {len(unique(cells))} cells failed, such as"
                f" {next(iter(failed))}; their logs are in {out / 'cells'}"
            )


def quantize_options() -> dict[str, Any]:
    """The options of ``qatc quantize`` and their defaults; None is none."""
    from qatc.recipe.recipe import Recipe

    parameters = signature(quantize).parameters
    found = {n: None if p.default is p.empty else p.default for n, p in parameters.items()}
    found.pop("context")
    of_recipe = signature(Recipe.from_bits).parameters  # left out, these options leave it to that
    found |= {name: of_recipe[name].default for name in found if name in of_recipe}
    return found | {"bits": options.BITS}


def _shard(text: str | None) -> tuple[int, int]:
    """``i/n``, or what a launcher says."""
    if text is None:
        text = f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"--shard takes i/n with i below n, such as 0/4; got {text!r}")
    return int(match[1]), int(match[2])
