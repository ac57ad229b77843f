"""``qatc quantize``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.data.config import CorpusConfig
from qatc.errors import ConfigError
from qatc.machine.world import joined
from qatc.storage.directories import refuse_overlap


def quantize(
    context: typer.Context,
    model: options.Model,
    config_file: options.RunFile = None,
    bits: options.Bits = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write. Default: NAME-BITS here.", show_default=False),
    ] = None,
    recipe: options.RecipeFile = None,
    group_size: options.GroupSize = None,
    kv_site: options.KVSite = None,
    skip: options.Skip = None,
    target: options.Target = None,
    head_bits: options.HeadBits = None,
    embedding_bits: options.EmbeddingBits = None,
    preset: options.Preset = None,
    kv_range: options.KVRange = None,
    method: Annotated[
        str,
        typer.Option(
            help="How it gets to its codes: rtn, or rotate, smoothquant, gptq and qat, joined by +."
        ),
    ] = "qat",
    budget: Annotated[
        float | None,
        typer.Option(
            help="Bits of a weight on average, such as 4.5: those of each linear are chosen so that"
            " KL grows least. Default: the same for all.",
            show_default=False,
        ),
    ] = None,
    calibration_rows: Annotated[
        int, typer.Option(help="Rows of the corpus that methods before qat look at, at most.")
    ] = 128,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Corpus made by generate-data, or where to write one. Default: OUTPUT.data.",
            show_default=False,
        ),
    ] = None,
    samples: options.Samples = CorpusConfig.sequences,
    max_length: Annotated[int, typer.Option(help="Tokens per training row and sequence.")] = (
        CorpusConfig.max_length
    ),
    strategy: options.Strategy = CorpusConfig.strategy,
    greedy_tokens: options.GreedyTokens = options.GREEDY_TOKENS,
    turns: options.Turns = None,
    generation_batch_size: options.Slots = "auto",
    record_logits: options.RecordLogits = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1500,
    batch_size: options.Rows = 8,
    accumulate: Annotated[int, typer.Option(help="Forward passes per step.")] = 1,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate. Default: by the model's width.", show_default=False),
    ] = None,
    warmup: Annotated[int, typer.Option(help="Warm-up steps.")] = 0,
    gradient_clip: Annotated[float, typer.Option(help="Greatest gradient norm.")] = 1.0,
    loss: Annotated[
        str,
        typer.Option(
            help="What to lower: logits, label, hidden, attention, reverse, or a sum such as"
            " logits+0.5*hidden:decay."
        ),
    ] = "logits",
    teacher: Annotated[
        str,
        typer.Option(
            help="online: it runs in every step; or recorded: what --record-logits recorded of it"
            " is read, and it is not in memory."
        ),
    ] = "online",
    loss_on: Annotated[
        str | None,
        typer.Option(
            help="Tokens that the loss counts: answers (of a corpus of conversations) or all."
            " Default: answers, if there are any.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            help="What is trained: full, scales or norms (only those), lora (low-rank updates of"
            " weights), blockwise (layer after layer), blockwise+full or blockwise+lora."
        ),
    ] = "full",
    blockwise_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of each layer with --train blockwise. Default: --steps, and a quarter of"
            " them before full.",
            show_default=False,
        ),
    ] = None,
    blockwise_rows: Annotated[
        int,
        typer.Option(
            help="Rows whose hidden states are kept in host memory for --train blockwise."
        ),
    ] = 1024,
    lora_rank: options.LoraRank = 16,
    loss_chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens whose logits are in memory at a time; 0 for a whole batch's. Default:"
            " chunks where logits are large.",
            show_default=False,
        ),
    ] = None,
    checkpoint_activations: Annotated[
        bool,
        typer.Option(
            "--checkpoint-activations",
            help="Keep the inputs of layers alone; the backward pass computes each layer again.",
        ),
    ] = False,
    optimizer: Annotated[
        str, typer.Option(help="adamw, or adamw8bit, whose moments take a quarter.")
    ] = "adamw",
    master_dtype: Annotated[
        str,
        typer.Option(help="Trained parameters in float32, or bfloat16 with stochastic rounding."),
    ] = "float32",
    fused_step: Annotated[
        bool,
        typer.Option(
            "--fused-step", help="Update each parameter in the backward pass; keep no gradients."
        ),
    ] = False,
    offload: Annotated[
        str,
        typer.Option(
            help="none; optimizer: its moments lie in host memory, beside a GPU; or parameters: so"
            " do both models and gradients, and layers come one after the other."
        ),
    ] = "none",
    train_embeddings: Annotated[
        bool,
        typer.Option(help="Train embeddings and lm_head too, or share the teacher's memory."),
    ] = True,
    seed: options.Seed = CorpusConfig.seed,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    keep_checkpoints: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Insist that there is an unfinished run to go on with.")
    ] = False,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            help="Text to evaluate on as well: a plain file, or .jsonl.", show_default=False
        ),
    ] = None,
    eval_samples: Annotated[int, typer.Option(help="Generated sequences to hold out.")] = 256,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    compile: options.Compile = None,
    integer_forward: Annotated[
        bool | None,
        typer.Option(
            "--integer-forward/--no-integer-forward",
            help="Train on int8 codes. Default: where that is exact and fast.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the integer model with the trained one, or mark it unverified.",
        ),
    ] = True,
    fit: Annotated[
        str | None,
        typer.Option(
            help="Memory of a GPU to fit into, such as 24GB, by the cheapest options that do: those"
            " that qatc estimate names.",
            show_default=False,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Quantize a model: the teacher writes a corpus, the student learns from it, integers come out.

    An interrupted run goes on when the same command is given again.

    [bold]Examples[/]

      qatc quantize --model meta-llama/Llama-2-7b-hf --bits 4-8-4

      qatc quantize --model ./my-model --bits 4-8-8 --group-size 64 --eval-text wiki.txt

      qatc quantize --model ./my-model --bits 4-4-4 --method rotate+gptq+qat

      qatc quantize --model ./my-model --bits 4-8-4 --budget 4.5

      qatc quantize --config DONE/run.yaml --output AGAIN
    """
    from qatc.cli import terminal

    told = "interrupted; the same command goes on from the last checkpoint"
    with readable_errors(told), joined(device) as world:
        chosen = options.build_recipe(
            *(bits, recipe, group_size, kv_site, skip, target, head_bits, embedding_bits),
            *(preset, kv_range),
            spelled_out=options.recipe_of_run_file(context),
        )
        if recipe is None and options.recipe_of_run_file(context) is None:  # which say it all
            from qatc.ptq.method import parse_method, with_rotations

            chosen = with_rotations(chosen, parse_method(method))
        greedy = options.parse_range(greedy_tokens)
        if output is None:
            mean = chosen.bits if budget is None else chosen.bits_spelled(f"{budget:g}")
            output = Path(f"{Path(model).resolve().name}-{mean}")
        if recipe is not None:
            refuse_overlap({"the output": output}, {"the recipe": recipe})
        if resume and not output.with_name(output.name + ".partial").exists():
            raise ConfigError(f"there is no unfinished run of {output} to resume; drop --resume")
        terminal.quiet_libraries()
        from qatc.quantize.run import quantize as run
        from qatc.quantize.settings import QuantizeConfig
        from qatc.report.tables import figure_rows
        from qatc.training.config import TrainingConfig

        config = QuantizeConfig(
            model=model,
            output=output,
            recipe=chosen,
            generation=CorpusConfig(
                sequences=samples,
                max_length=max_length,
                strategy=strategy,  # type: ignore[arg-type]  # checked by the config
                greedy_tokens=greedy,
                seed=seed,
                batch_size=options.parse_slots(generation_batch_size),
                turns=turns,
                record_logits=record_logits,
            ),
            training=TrainingConfig(
                steps=steps,
                batch_size=batch_size,
                accumulate=accumulate,
                learning_rate=lr,
                warmup_steps=warmup,
                gradient_clip=gradient_clip,
                seed=seed,
                checkpoint_every=checkpoint_every,
                keep_checkpoints=keep_checkpoints,
                loss=loss,
                teacher=teacher,  # type: ignore[arg-type]  # checked by the config
                train=train,
                blockwise_steps=blockwise_steps,
                blockwise_rows=blockwise_rows,
                lora_rank=lora_rank,
                loss_chunk=loss_chunk,
                checkpoint_activations=checkpoint_activations,
                optimizer=optimizer,
                master_dtype=master_dtype,
                fused_step=fused_step,
                offload=offload,
            ),
            method=method,
            budget=budget,
            calibration_rows=calibration_rows,
            loss_on=loss_on,  # type: ignore[arg-type]  # checked by the config
            data=data,
            eval_text=eval_text,
            eval_sequences=eval_samples,
            dtype=dtype,  # type: ignore[arg-type]  # checked by the config
            device=device,
            train_embeddings=train_embeddings,
            compile=compile,
            integer_forward=integer_forward,
            overwrite=overwrite,
            verify=verify,
            trust_remote_code=trust_remote_code,
        )
        if fit is not None:
            from qatc.estimate import parse_memory
            from qatc.estimate.fitting import fitted

            config, choice = fitted(config, parse_memory(fit))
            told = " ".join(choice.typed) or "the options as they are"
            if world.first:
                terminal.note(f"to fit into {fit}: {told}, {choice.added:.0%} more time for a step")
        with terminal.RunDisplay().live() if world.first else nullcontext() as display:
            result = run(config, display)
    if not world.first:
        return
    if json:
        figures = {t: {m: v.to_dict() for m, v in r.items()} for t, r in result.figures.items()}
        terminal.print_json(
            {"output": str(result.output), "data": str(result.data), "figures": figures}
        )
        return
    terminal.print_table(figure_rows(result.figures))
    terminal.out.print(f"model   {result.output}", highlight=False)
    terminal.out.print(f"report  {result.output / 'report.md'}", highlight=False)
    terminal.out.print(f"corpus  {result.data} (reuse it with --data)", highlight=False)
