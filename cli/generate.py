"""``qatc generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from qatc.cli import options
from qatc.cli.errors import readable_errors
from qatc.errors import ConfigError, QatcError


def generate(
    model: options.Output,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue.", show_default=False)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk to it, with the tokenizer's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0 takes the most likely token.")
    ] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from this share of probability.")] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text to stop at; may be repeated.", show_default=False),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    compile: options.Compile = None,
    trust_remote_code: options.TrustRemoteCode = False,
    kernels: options.Kernels = "auto",
    json: options.Json = False,
) -> None:
    """Write text with the integer model: packed weights, packed KV cache.

    [bold]Examples[/]

      qatc generate Llama-2-7b-4-8-4 --prompt "Once upon a time"

      qatc generate Llama-2-7b-chat-4-8-4 --chat
    """
    from qatc.cli import terminal

    with readable_errors():
        if (prompt is None) == (not chat):
            raise ConfigError("say what to write: either --prompt TEXT or --chat")
        if chat and json:
            raise ConfigError("--json is for --prompt; a chat is read by a person")
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                "max-new-tokens must be at least 1, temperature not negative and top-p above 0 and"
                f" at most 1; got {max_new_tokens}, {temperature:g} and {top_p:g}"
            )
        terminal.quiet_libraries()
        from qatc.runtime.cuda.graphed import why_not_replayed
        from qatc.runtime.generate_text import Writer

        writer = Writer(
            model,
            device=device,
            compile=compile,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            trust_remote_code=trust_remote_code,
            kernels=kernels,
        )
        if writer.left_out:
            settings = ", ".join(f"{name}={value!r}" for name, value in writer.left_out.items())
            terminal.note(f"left out of the model's generation config: {settings}")
        terminal.warn_unverified(model)
        if chat:
            _talk(writer)
            return
        assert prompt is not None
        written = writer.write(prompt, None if json else terminal.stream)
    if json:
        terminal.print_json(written.to_dict())
        return
    terminal.stream("\n")
    terminal.note(str(written))
    if reason := why_not_replayed(writer.model):
        terminal.note(f"every layer was called by itself, as there is no CUDA graph: {reason}")


def _talk(writer: object) -> None:
    from qatc.cli import terminal
    from qatc.runtime.generate_text import Writer

    assert isinstance(writer, Writer)
    writer.require_chat_template()
    terminal.note("an empty line ends the conversation")
    turns: list[dict[str, str]] = []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        turns.append({"role": "user", "content": said})
        try:
            written = writer.answer(turns, terminal.stream)
        except QatcError as error:  # of this turn alone: not UTF-8, or too long
            terminal.print_error(str(error))
            turns.pop()
            continue
        terminal.stream("\n")
        terminal.note(str(written))
        turns.append({"role": "assistant", "content": written.text})
