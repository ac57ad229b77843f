"""``qatc verify``."""

from __future__ import annotations

from qatc.cli import options
from qatc.cli.errors import readable_errors


def verify(
    model: options.Output,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
    kernels: options.Kernels = "auto",
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
        from qatc.report.tables import check_rows

        report = run(
            model,
            device=pick_device(device),
            trust_remote_code=trust_remote_code,
            kernels=kernels,  # type: ignore[arg-type]  # checked there
        )
        if json:
            terminal.print_json(report.to_dict())
        else:
            verdicts = ["", *("ok" if check.passed else "differs" for check in report.checks)]
            rows = check_rows(report.checks)
            terminal.print_table([[v, *row] for v, row in zip(verdicts, rows, strict=True)])
        report.require(str(model))
