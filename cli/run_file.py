"""``--config``: a whole run from a file, with the names of the options as keys."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from qatc.errors import QatcError
from qatc.recipe.recipe import Recipe
from qatc.storage.files import read_yaml

_RECIPE = "qatc.recipe"


def _read(context: typer.Context, parameter: typer.CallbackParam, file: Path | None) -> Path | None:
    """Let what is in the file stand where the command line says nothing."""
    if file is None or context.resilient_parsing:
        return file
    try:
        plain = read_yaml(
            file, "the run file", "holds no options; it takes lines such as 'steps: 300'"
        )
        values = {str(key).replace("-", "_"): value for key, value in plain.items()}
        if isinstance(values.get("recipe"), Mapping):  # as runs write it, and no file's name
            context.meta[_RECIPE] = Recipe.from_dict(values.pop("recipe"))
    except QatcError as error:
        raise typer.BadParameter(str(error)) from None
    known = {p.name for p in context.command.params if p.name} - {parameter.name}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or sorted(known)
            options = ", ".join(other.replace("_", "-") for other in near)
            raise typer.BadParameter(f"{file}: there is no option {name!r}; there is {options}")
    context.default_map = values
    return file


def recipe(context: typer.Context) -> Recipe | None:
    """The recipe that is spelled out in the file of this command, if there is one."""
    found: Recipe | None = context.meta.get(_RECIPE)
    return found


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of options, such as the run.yaml of an output; options given here win.",
        is_eager=True,
        callback=_read,
        show_default=False,
    ),
]
