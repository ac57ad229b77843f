"""``qatc inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatc.cli import options
from qatc.cli.errors import readable_errors

if TYPE_CHECKING:
    from qatc.inspect import Plan, Site


def inspect(
    model: options.Model,
    bits: options.Bits = None,
    recipe: options.RecipeFile = None,
    group_size: options.GroupSize = None,
    kv_site: options.KVSite = None,
    skip: options.Skip = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Show what would be quantized, what is skipped and why, and the size. Loads no weights.

    [bold]Example[/]

      qatc inspect --model meta-llama/Llama-2-7b-hf --bits 4-8-4
    """
    from qatc.cli import terminal

    with readable_errors():
        chosen = options.build_recipe(bits, recipe, group_size, kv_site, skip)
        terminal.quiet_libraries()
        from qatc.inspect import inspect_model

        plan = inspect_model(model, chosen, trust_remote_code=trust_remote_code)
    if json:
        terminal.print_json(plan.to_dict())
        return
    _render(plan)


def _render(plan: Plan) -> None:
    from qatc.cli import terminal

    for kind in plan.kinds:
        rows = [["site", "of", "shape", "bits", "scales"]]
        for site in kind.sites:
            scales = f"per {site.group_size} values" if site.group_size else _row(site)
            shape = " x ".join(map(str, site.shape))
            rows.append([site.kind, site.where, shape, str(site.bits), scales])
        title = f"{len(kind.layers)} x {kind.name}: {kind.layers[0]} to {kind.layers[-1]}"
        terminal.print_table(rows, title)
        passes = [["pass", "options", "matched", "edited"]]
        for record in kind.passes:
            options_text = ", ".join(f"{k}={v}" for k, v in _flat(record["options"]).items())
            passes.append(
                [record["name"], options_text, str(record["matched"]), str(record["edited"])]
            )
        terminal.print_table(passes, "passes")
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        reasons.setdefault(reason, []).append(name)
    skipped = [["in full precision because", "parameters", "for example"]]
    skipped += [[reason, str(len(names)), names[0]] for reason, names in reasons.items()]
    terminal.print_table(skipped)
    before, after = plan.operations
    terminal.print_table(
        [
            ["estimate", "full precision", plan.bits, "ratio"],
            _line("checkpoint, GB", *plan.size_gb),
            _line("KV cache, bytes per token", *plan.kv_bytes_per_token),
            _line("OPs = MACs x W bits x A bits at length 2048, 1e12", before / 1e12, after / 1e12),
        ]
    )


def _row(site: Site) -> str:
    """What one scale is for, where there are no groups."""
    if site.kind == "weight":
        return "per output channel"
    return "per token and head" if len(site.shape) == 4 else "per token"


def _line(name: str, before: float, after: float) -> list[str]:
    return [name, f"{before:,.4g}", f"{after:,.4g}", f"{after / before:.3f}"]


def _flat(options: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in options.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if value not in (None, (), [])}
