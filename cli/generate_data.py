"""``qatc generate-data``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.data.config import CHAT, CorpusConfig, Recording
from qatc.errors import ConfigError
from qatc.machine.world import joined
from qatc.progress import Observer

if TYPE_CHECKING:  # it loads NumPy
    from qatc.data.corpus import Corpus


WRITING = ("strategy", "greedy_tokens", "turns", "batch_size", "seed", "dtype", "device", "compile")
"""Parameters of the command that say how a model writes."""


def generate_data(
    context: typer.Context,
    model: options.Model,
    output: Annotated[Path, typer.Option(help="Directory of the corpus.", show_default=False)],
    from_text: Annotated[
        Path | None,
        typer.Option(
            help="Take the corpus from this text, and let no model write: a .jsonl file with a"
            " document (field text) in each line, or any other text.",
            show_default=False,
        ),
    ] = None,
    samples: options.Samples = CorpusConfig.sequences,
    max_length: Annotated[int, typer.Option(help="Tokens per sequence at most.")] = (
        CorpusConfig.max_length
    ),
    strategy: options.Strategy = CorpusConfig.strategy,
    greedy_tokens: options.GreedyTokens = options.GREEDY_TOKENS,
    turns: options.Turns = None,
    batch_size: options.Slots = "auto",
    shard_size: Annotated[int, typer.Option(help="Sequences per file.")] = (
        CorpusConfig.shard_size
    ),
    record_logits: options.RecordLogits = None,
    seed: options.Seed = CorpusConfig.seed,
    preview: Annotated[int, typer.Option(help="Print this many samples at the end.")] = 0,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    compile: options.Compile = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Let a model write its own training corpus, or take it from a text, as token ids on the disk.

    An interrupted run goes on when the same command is given again, and ends with the same bytes.

    [bold]Examples[/]

      qatc generate-data --model meta-llama/Llama-2-7b-hf --output llama.data --samples 20000

      qatc generate-data --model ./my-model --output my.data --preview 3

      qatc generate-data --model ./my-chat-model --output chat.data --strategy chat

      qatc generate-data --model ./my-model --output c4.data --from-text c4.jsonl

      qatc generate-data --model ./my-model --output my.data --record-logits 32+32
    """
    from qatc.cli import terminal

    told = "interrupted; the same command goes on from the last complete shard"
    with readable_errors(told), joined(device) as world:
        greedy = options.parse_range(greedy_tokens)
        terminal.quiet_libraries()
        from qatc.data.chat import ChatFormat
        from qatc.data.generate import corpus_place, generate_corpus
        from qatc.data.text import corpus_from_text, record_on_text
        from qatc.models import load_config, load_tokenizer
        from qatc.models.load import check_length, load_teacher
        from qatc.models.preparation import can_compile

        if from_text is not None:
            recording = None if record_logits is None else Recording.parse(record_logits)
            _refuse_writing(context, ("dtype", "device") if recording is not None else ())
            check_length(model, load_config(model, trust_remote_code=trust_remote_code), max_length)
            tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
            if not world.first:
                return
            corpus = corpus_from_text(
                *(from_text, tokenizer, output),
                model=model,
                sequences=samples,
                max_length=max_length,
                shard_size=shard_size,
            )
            if recording is not None:
                with terminal.RunDisplay().live() as shown:
                    shown.stage(f"Loading {model}")
                    teacher = load_teacher(
                        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code
                    )
                    shown.stage(f"Recording what it says of the text, in {output}")
                    record_on_text(teacher, tokenizer, corpus, recording, shown.recorded)
            _show(corpus, tokenizer, preview, json)
            return
        config = CorpusConfig(
            sequences=samples,
            max_length=max_length,
            strategy=strategy,  # type: ignore[arg-type]  # checked by the config
            greedy_tokens=greedy,
            seed=seed,
            batch_size=options.parse_slots(batch_size),
            shard_size=shard_size,
            turns=turns,
            record_logits=record_logits,
        )
        with ExitStack() as held:
            world.on_first(lambda: held.enter_context(corpus_place(output, model)))
            display: Observer = Observer()
            if world.first:
                display = held.enter_context(terminal.RunDisplay().live())
            display.stage(f"Loading {model}")
            tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
            if config.strategy == CHAT:
                ChatFormat.of(tokenizer, model)
            teacher = load_teacher(
                model, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
            display.stage(f"Writing {samples} sequences to {output}")
            corpus = generate_corpus(
                teacher,
                tokenizer,
                output,
                config,
                compile=can_compile(teacher.model.device) if compile is None else compile,
                on_progress=lambda done, tokens: display.generated(done, samples, tokens),
                on_recorded=display.recorded,
            )
    if world.first:
        _show(corpus, tokenizer, preview, json)


def _refuse_writing(context: typer.Context, but: Sequence[str]) -> None:
    """Raise if the command line says how a model is to write, where none does, ``but`` for some."""
    told = [name for name in WRITING if name not in but]
    sources = {name: context.get_parameter_source(name) for name in told}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"no model writes with --from-text; leave out {named}")


def _show(corpus: Corpus, tokenizer: Any, preview: int, json: bool) -> None:
    """Print what was made."""
    from qatc.cli import terminal
    from qatc.data.teacher_logits import Recorded, recorded_as

    what = recorded_as(corpus.path)
    recorded = None if what is None else Recorded.open(corpus)
    manifest = corpus.manifest
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    answers = sum(shard.get("answer_tokens", 0) for shard in manifest["shards"])
    if json:
        found = {"output": str(corpus.path), "tokens": tokens, **manifest}
        terminal.print_json(found | ({} if recorded is None else {"recorded": recorded.manifest}))
        return
    for number, sequence in enumerate(corpus.sequences()[:preview]):
        terminal.out.rule(f"sample {number}, {len(sequence)} tokens", align="left")
        terminal.out.print(tokenizer.decode(sequence), markup=False, highlight=False)
    shards = len(manifest["shards"])
    counted = f" ({answers:,} in answers)" if corpus.is_chat else ""
    terminal.out.print(
        f"{corpus.path}: {manifest['sequences']} sequences, {tokens:,} tokens{counted} in {shards}"
        " shards",
        highlight=False,
    )
    if recorded is not None:
        terminal.out.print(
            f"teacher recorded: {what}, {recorded.bytes_per_token:.0f} bytes a token",
            highlight=False,
        )
