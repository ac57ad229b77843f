"""``qatc estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.data.config import CorpusConfig
from qatc.errors import ConfigError

if TYPE_CHECKING:
    from qatc.estimate import Estimate, Setup, Shape, Speed


def estimate(
    model: Annotated[
        str,
        typer.Argument(
            help="Directory or hub name of a model, or its config.json.", show_default=False
        ),
    ],
    gpus: Annotated[int, typer.Option(help="GPUs that share the work.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of each GPU, such as 24GB. Default: what this machine has.",
            show_default=False,
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="10^12 operations a second that a GPU reaches in products of the compute dtype."
            " Default: measured, if it is this machine that is asked about.",
            show_default=False,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="GB/s of a GPU's memory. Default: measured, or 10 for each of --tflops.",
            show_default=False,
        ),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            help="GB/s between a GPU and the host's memory. Default: 16.", show_default=False
        ),
    ] = None,
    bits: options.Bits = None,
    recipe: options.RecipeFile = None,
    group_size: options.GroupSize = None,
    samples: options.Samples = CorpusConfig.sequences,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = CorpusConfig.max_length,
    generation_batch_size: options.Slots = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps of the training.")] = 1500,
    batch_size: options.Rows = 8,
    accumulate: Annotated[int, typer.Option(help="Forward passes of a step.")] = 1,
    eval_samples: Annotated[int, typer.Option(help="Sequences that are held out.")] = 256,
    keep_checkpoints: Annotated[int, typer.Option(help="Checkpoints on the disk.")] = 2,
    train_embeddings: Annotated[
        bool, typer.Option(help="Embeddings and lm_head are trained too.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="The output is verified in the same run.")
    ] = True,
    teacher: Annotated[str, typer.Option(help="online, or recorded before.")] = "online",
    optimizer: Annotated[str, typer.Option(help="State of adamw in fp32, or of adamw8bit.")] = (
        "adamw"
    ),
    master_dtype: Annotated[str, typer.Option(help="Masters in float32 or bfloat16.")] = "float32",
    loss_chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens whose logits are there at a time; 0 for all. Default: fewer than all where"
            " they are large.",
            show_default=False,
        ),
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Activations are computed again.")
    ] = False,
    fused_step: Annotated[
        bool, typer.Option("--fused-step", help="One tensor's gradient is there at a time.")
    ] = False,
    offload: Annotated[
        str, typer.Option(help="What the host's memory holds: none, optimizer or parameters.")
    ] = "none",
    train: Annotated[
        str, typer.Option(help="What is trained: full, or lora, low-rank updates of weights.")
    ] = "full",
    lora_rank: options.LoraRank = 16,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    compile: Annotated[bool, typer.Option(help="Graphs are compiled.")] = True,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Say what qatc quantize would take, by a model's config alone: memory, time, disk, what fits.

    No weights are read. With --gpus or --memory it is GPUs that are asked about, else this machine.

    [bold]Examples[/]

      qatc estimate meta-llama/Llama-2-7b-hf --memory 24GB

      qatc estimate ./my-model --gpus 8 --memory 80GB --tflops 400 --bandwidth 2500

      qatc estimate config.json --memory 24GB --teacher recorded --offload optimizer
    """
    from qatc.cli import terminal

    with readable_errors():
        chosen = options.build_recipe(bits, recipe, group_size)
        terminal.quiet_libraries()
        from qatc.estimate import Setup, parse_memory, read_shape
        from qatc.estimate import estimate as reckon
        from qatc.machine.device import pick_device, total_memory
        from qatc.models.pipelines import recipe_allows_integers, why_no_integer_forward
        from qatc.quantize.given import why_recipe_wants_whole

        shape = read_shape(model, trust_remote_code=trust_remote_code)
        elsewhere = (memory is not None or gpus > 1) and device == "auto"
        place = "cuda" if elsewhere else pick_device(device)
        on_integers = recipe_allows_integers(chosen)
        if not elsewhere:
            import torch

            on_integers = why_no_integer_forward(chosen, torch.device(place)) is None
        setup = Setup(
            compute=_compute(dtype, place, shape),
            weight_bits=chosen.weights.bits,
            integer_forward=on_integers,
            compile=compile,
            on_gpu=place.startswith("cuda"),
            gpus=gpus,
            divided=why_recipe_wants_whole(chosen) is None,
            batch_size=batch_size,
            accumulate=accumulate,
            max_length=max_length,
            steps=steps,
            samples=samples,
            eval_samples=eval_samples,
            slots=None
            if (slots := options.parse_slots(generation_batch_size)) == "auto"
            else slots,
            train_embeddings=train_embeddings,
            keep_checkpoints=keep_checkpoints,
            verify=verify,
            teacher=teacher,
            optimizer=optimizer,
            master_dtype=master_dtype,
            loss_chunk=loss_chunk,
            checkpoint_activations=checkpoint_activations,
            fused_step=fused_step,
            offload=offload,
            train=train,
            lora_rank=lora_rank,
        )
        room = parse_memory(memory) if memory is not None else None
        if room is None and not elsewhere:
            room = total_memory(place)
        if room is None:
            raise ConfigError(
                f"how much memory each of the {gpus} GPUs has is not known; give --memory"
            )
        here = None if elsewhere else place
        found = reckon(shape, setup, room, _speed(shape, setup, tflops, bandwidth, link, here))
    if json:
        terminal.print_json(found.to_dict())
        return
    _render(found)


def _compute(dtype: str, place: str, shape: Shape) -> str:
    from qatc.machine.device import check_dtype, pick_dtype

    check_dtype(dtype)
    if dtype != "auto":
        return dtype
    if place.startswith("cuda"):
        return "bfloat16"

    class Config:
        hidden_size = shape.hidden

    return str(pick_dtype("auto", place, Config)).removeprefix("torch.")


def _speed(
    shape: Shape,
    setup: Setup,
    tflops: float | None,
    bandwidth: float | None,
    link: float | None,
    here: str | None,
) -> Speed | None:
    """What is said of the machine, or what is measured of this one; None where neither is."""
    from qatc.estimate import Speed, measure_speed
    from qatc.estimate.work import LINK

    for name, value in (("tflops", tflops), ("bandwidth", bandwidth), ("link", link)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} must be a positive number; got {value:g}")
    if tflops is not None:
        return Speed(tflops, bandwidth or 10 * tflops, link or LINK)
    if here is None:
        if bandwidth is not None or link is not None:
            raise ConfigError("--bandwidth and --link count beside --tflops; give that as well")
        return None
    found = measure_speed(shape, setup.compute, here)
    return Speed(found.tflops, bandwidth or found.bandwidth, link or LINK)


def _render(found: Estimate) -> None:
    from qatc.cli import terminal
    from qatc.estimate.tables import disk_rows, headline, memory_rows, option_rows, time_rows

    def say(text: str) -> None:
        terminal.out.print(text, highlight=False)

    shape, setup = found.shape, found.setup
    say(f"{shape.name}: {shape.parameters / 1e9:.3g} billion parameters, {shape.layers} layers")
    each = " of each GPU" if setup.gpus > 1 else ""
    terminal.print_table(memory_rows(found.phases, found.memory), f"memory{each}, as asked for")
    say(headline(found))
    chosen = found.choice or found.nearest
    if not found.fits and chosen is not None:
        terminal.print_table(option_rows(found), "options, by the time that they add")
        title = f"memory{each}, with these options"
        terminal.print_table(memory_rows(found.chosen_phases, found.memory), title)
    times: Any = found.seconds if found.fits else found.chosen_seconds
    if times is not None:
        terminal.print_table(time_rows(times, setup.steps), "time, without loading and compiling")
    else:
        say("for times, give what a GPU reaches: --tflops, and --bandwidth")
    terminal.print_table(disk_rows(found.disk if found.fits else found.chosen_disk))
