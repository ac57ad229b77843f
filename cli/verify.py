"""``qatc verify``."""

from __future__ import annotations

from qatc.cli import options
from qatc.cli.errors import readable_errors


def verify(
    model: options.Output,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Compare the integer model with the graph that was trained; exit with 1 if they differ.

    [bold]Example[/]

      qatc verify Llama-2-7b-4-8-4
    """
    from qatc.cli import terminal

    with readable_errors():
        terminal.quiet_libraries()
        from qatc.evaluation.parity import verify as run
        from qatc.machine.device import pick_device

        report = run(model, device=pick_device(device), trust_remote_code=trust_remote_code)
        if json:
            terminal.print_json(report.to_dict())
        else:
            rows = [["", "compared", "found", "limit"]]
            rows += [
                ["ok" if c.passed else "differs", f"{c.point}: {c.what}", f"{c.figure:.2g}"]
                + ["reported" if c.limit is None else f"{c.limit:.2g}"]
                for c in report.checks
            ]
            terminal.print_table(rows)
        report.require(str(model))
