"""``qatc evaluate`` and ``qatc verify``: how good, and whether it is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.errors import ConfigError

if TYPE_CHECKING:
    from qatc.evaluation.evaluate import TasksConfig


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A qatc output, any full-precision model, or a GGUF file.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to evaluate on: a plain file, or .jsonl of documents.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Corpus to evaluate on.", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval to evaluate on, separated by commas; paper, fewshot and"
            " perplexity stand for those of LLM-QAT.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Full-precision model, for KL and agreement, or for its answers to the tasks;"
            " with --tasks also the --output of an earlier run, whose model is then compared with.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Round a full-precision model to these bits.", show_default=False),
    ] = None,
    head_bits: options.HeadBits = None,
    embedding_bits: options.EmbeddingBits = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per row, or that a task gives the model at once. Default: 256; with"
            " --tasks 2048, or what the model takes.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the text to evaluate on, at most. Default: 65536.", show_default=False
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            help="Directory of task files of your own. Tasks there that are called NAME_local"
            " stand for NAME in paper, fewshot and perplexity.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Items of each task, the first ones. Default: all.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            help="Examples in the prompt, of tasks that leave it open. Default: what the task"
            " says.",
            show_default=False,
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="What runs an output: trained (the graph that was trained), packed (the integer"
            " model) or, on a text, vllm, or llama.cpp, which takes GGUF files too. Default:"
            " trained.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file for the results of tasks, with all that lm-eval returned.",
            show_default=False,
        ),
    ] = None,
    batch_size: options.Rows = 8,
    device: options.Device = "auto",
    compile: options.Compile = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Measure perplexity on a text, or the tasks of lm-eval, and compare with a teacher.

    [bold]Examples[/]

      qatc evaluate Llama-2-7b-4-8-4 --text wiki.txt --teacher meta-llama/Llama-2-7b-hf

      qatc evaluate ./my-model --bits 4-8-4 --text wiki.txt --teacher ./my-model

      qatc evaluate Llama-2-7b-4-8-4 --text wiki.txt --runtime llama.cpp

      qatc evaluate Llama-2-7b-4-8-4 --text wiki.txt --runtime vllm

      qatc evaluate Llama-2-7b-4-8-4 --tasks paper --teacher meta-llama/Llama-2-7b-hf
    """
    from qatc.cli import terminal

    with readable_errors():
        recipe = None
        if bits is not None:
            recipe = options.build_recipe(
                bits, None, head_bits=head_bits, embedding_bits=embedding_bits
            )
        elif head_bits is not None or embedding_bits is not None:
            raise ConfigError("--head-bits and --embedding-bits need --bits beside them")
        of_text = {"text": text, "data": data, "max_tokens": max_tokens}
        of_tasks: dict[str, Any] = {"include_path": include_path, "limit": limit}
        of_tasks |= {"num_fewshot": num_fewshot, "output": output}
        misplaced = options.spelled(of_text if tasks is not None else of_tasks)
        if misplaced:
            beside = "not beside" if tasks is not None else "for"
            raise ConfigError(f"{', '.join(misplaced)}: {beside} --tasks; leave out either")
        terminal.quiet_libraries()
        from qatc.evaluation.evaluate import AssessConfig, TasksConfig, assess

        common: dict[str, Any] = {
            "model": model,
            "teacher": teacher,
            "recipe": recipe,
            "batch_size": batch_size,
            "device": device,
            "compile": compile,
            "trust_remote_code": trust_remote_code,
        }
        if runtime is not None:
            common["runtime"] = runtime
        if tasks is not None:
            on_tasks = TasksConfig(
                **common,
                tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
                include_path=include_path,
                limit=limit,
                num_fewshot=num_fewshot,
                max_length=length,
            )
            _evaluate_tasks(on_tasks, output, json)
            return
        lengths = {"length": length, "max_tokens": max_tokens}
        given: dict[str, Any] = {
            name: value for name, value in lengths.items() if value is not None
        }
        on_text = AssessConfig(**common, text=text, data=data, **given)
        with terminal.RunDisplay().live() as display:
            metrics = assess(on_text, display)
    if json:
        terminal.print_json(metrics.to_dict())
        return
    rows = [["figure", "value"], ["perplexity", f"{metrics.perplexity:.4g}"]]
    if metrics.kl is not None and metrics.top1_agreement is not None:
        rows += [["KL to teacher", f"{metrics.kl:.4f}"]]
        rows += [["top-1 agreement", f"{metrics.top1_agreement:.1%}"]]
    terminal.print_table([*rows, ["scored tokens", f"{metrics.tokens:,}"]])


def _evaluate_tasks(config: TasksConfig, output: Path | None, json: bool) -> None:
    from qatc.cli import terminal
    from qatc.evaluation.evaluate import assess_tasks
    from qatc.report.tables import numerics_text, task_rows
    from qatc.storage.files import write_json

    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ConfigError(f"--output takes a file in a directory that is there; got {output}")
    with terminal.RunDisplay().live() as display:
        found = assess_tasks(config, display)
    if output is not None:
        write_json(output, found.to_dict(raw=True))
    if json:
        terminal.print_json(found.to_dict())
    else:
        terminal.print_table(task_rows(found), title=numerics_text(found.model.numerics))


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
