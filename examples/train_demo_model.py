"""Train the small demonstration checkpoint in ``examples/demo-model``.

The model is a LLaMA-architecture language model of about 1.1 million parameters with its own
byte-level BPE tokenizer. It learns the source of the Python standard library of the interpreter
that runs this script, less a few modules held out for the reported perplexity; nothing is fetched.

    python examples/train_demo_model.py --output examples/demo-model --overwrite
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from qatc.errors import QatcError
from qatc.storage.directories import complete_directory, refuse_existing

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "demo-model"
BOS, EOS = "<s>", "</s>"
CONTEXT, VOCABULARY, CROP_LENGTHS = 256, 1024, (128, 256)
HELD_OUT = (
    "bisect.py calendar.py csv.py fnmatch.py fractions.py glob.py heapq.py queue.py sched.py "
    "shlex.py textwrap.py"
).split()
SKIPPED_FOLDERS = frozenset(
    "site-packages test tests idlelib lib2to3 turtledemo __pycache__ encodings pydoc_data".split()
)
BUILD_RECORDS = ("_sysconfigdata", "config-")  # they describe one machine
SAMPLE_PROMPTS, SAMPLE_TEMPERATURE, SAMPLE_TOKENS = ("def read", "class", "import"), 0.7, 200


class Score(NamedTuple):
    """How well a model predicts a text, per token and per byte of UTF-8."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Read the library sources in sorted order; return the training and held-out documents."""
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or str(relative).startswith(BUILD_RECORDS):
            continue
        with suppress(UnicodeDecodeError):
            text = path.read_bytes().decode()
            (held_out if str(relative) in HELD_OUT else train).append(text)
    return [text for text in train if text], held_out


def train_tokenizer(texts: list[str]) -> FastTokenizer:
    """Train a byte-level BPE tokenizer that puts BOS before every encoded text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return FastTokenizer(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=EOS,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(tokenizer: FastTokenizer) -> LlamaForCausalLM:
    """Create the untrained model in float32: narrow and deep, so that rounding hurts it."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=10,
        num_attention_heads=3, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=CONTEXT, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def token_stream(tokenizer: FastTokenizer, texts: list[str]) -> torch.Tensor:
    """Join the documents into one tensor of tokens, each as BOS, text, EOS."""
    documents = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([i for ids in documents for i in (*ids, tokenizer.eos_token_id)])


def random_crops(stream: torch.Tensor, tokens: int, bos: int, rng: torch.Generator) -> torch.Tensor:
    """Cut a batch of random windows, each begun with BOS as an encoded text is."""
    length = CROP_LENGTHS[int(torch.randint(len(CROP_LENGTHS), (), generator=rng))]
    starts = torch.randint(len(stream) - length, (tokens // length, 1), generator=rng)
    crops = stream[starts + torch.arange(length)]
    crops[:, 0] = bos
    return crops


def next_token_loss(model: Any, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean cross-entropy of every token after the first."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, texts: list[str]) -> Score:
    """Score every token of the texts, in windows after a BOS that do not overlap."""
    model.eval()
    nats, tokens, step = 0.0, 0, CONTEXT - 1
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for at in range(0, len(ids), step):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[at : at + step]]])
            scored = window.shape[1] - 1
            nats += next_token_loss(model, window, bf16=False).item() * scored
            tokens += scored
    model.train()
    size = len("".join(texts).encode())
    return Score(math.exp(nats / tokens), nats / math.log(2) / size, tokens, size)


def make_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay: attention grows as sharp as it does in long training."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


def train(
    model: Any, stream: torch.Tensor, measure: Callable[[], Score], args: argparse.Namespace
) -> float:
    """Train the model in place and return the seconds it took."""
    rng = torch.Generator().manual_seed(args.seed)
    optimizer = make_optimizer(model, args.lr)
    warmup = min(200, args.steps // 10)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, args.steps)
    model.set_attn_implementation("eager")  # Inductor fuses it; SDPA's backward is slow on CPUs
    if not args.plain:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    model.train()
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        crops = random_crops(stream, args.batch_tokens, model.config.bos_token_id, rng)
        loss = next_token_loss(model, crops, bf16=not args.plain)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            rate = step * args.batch_tokens / (time.perf_counter() - began)
            print(f"step {step} loss {loss.item():.3f} {rate:.0f} tokens/s", flush=True)
        if step % args.eval_every == 0:
            print(f"step {step} held-out perplexity {measure().perplexity:.2f}", flush=True)
    return time.perf_counter() - began


def plain_copy(model: Any) -> LlamaForCausalLM:
    """The same model without compiled layers, with its default attention."""
    copied = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict()))
    copied.load_state_dict(model.state_dict())
    copied.generation_config = model.generation_config
    return copied


def sample(model: Any, tokenizer: Any, prompt: str, seed: int) -> str:
    """Continue a prompt by sampling."""
    torch.manual_seed(seed)
    generated = model.eval().generate(
        **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), do_sample=True,
        top_k=0, temperature=SAMPLE_TEMPERATURE, max_new_tokens=SAMPLE_TOKENS,
    )  # fmt: skip
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


CARD = """\
---
license: psf-2.0
---

# qatc demo model

A small LLaMA-architecture language model of Python source code. It exists to demonstrate `qatc` on
a real checkpoint that fits in a repository, and for nothing else: its code does not work.

| | |
|---|---|
| Parameters | {parameters:,} (embeddings tied) |
| Layers | {c.num_hidden_layers}, hidden size {c.hidden_size}, MLP size {c.intermediate_size} |
| Heads | {c.num_attention_heads} over {c.num_key_value_heads} key/value heads, size {c.head_dim} |
| Context | {c.max_position_embeddings} tokens |
| Tokenizer | byte-level BPE, {c.vocab_size} entries, puts `<s>` before every text |
| Weights | {dtype}, safetensors |
| Held out | perplexity **{held.perplexity:.2f}**, {held.bits_per_byte:.3f} bits per byte |

## Data

The source of the standard library of CPython {python}: {files} modules, {train_bytes:,} bytes,
{train_tokens:,} tokens. Left out are tests, IDLE, lib2to3, turtledemo, `encodings`, `pydoc_data`
and build records. Held out whole, for the perplexity alone ({held.bytes:,} bytes, {held.tokens:,}
tokens): {names}.

Licence of the data: the PSF License Agreement of Python, which this checkpoint follows.

## Training

- {args.steps:,} steps of {args.batch_tokens:,} tokens: {seen:,} in all
- {minutes:.1f} minutes on a {device}, in {precision}
- AdamW, peak learning rate {args.lr:g}, warm-up and cosine decay, seed {args.seed}
- PyTorch {torch}, transformers {transformers}

`python examples/train_demo_model.py` trains the tokenizer and the model, measures every figure
given here and writes this file. The perplexity is that of the saved weights, reloaded from disk and
computed in float32, over windows of {c.max_position_embeddings} tokens that do not overlap.

## Samples

Temperature {temperature}, the whole vocabulary, {new_tokens} new tokens.
"""


def model_card(facts: dict[str, Any], samples: list[str]) -> str:
    """Write the model card from measured figures."""
    card = CARD.format(**facts, names=", ".join(f"`{name}`" for name in HELD_OUT),
                       temperature=SAMPLE_TEMPERATURE, new_tokens=SAMPLE_TOKENS)  # fmt: skip
    for seed, (prompt, text) in enumerate(zip(SAMPLE_PROMPTS, samples, strict=True)):
        card += f"\nPrompt `{prompt}`, seed {seed}:\n\n~~~~python\n{text.rstrip()}\n~~~~\n"
    return card


def is_demo_model(folder: Path) -> bool:
    """Whether a folder was written by this script, so that it may replace it."""
    card = folder / "README.md"
    return card.is_file() and card.read_text(encoding="utf-8").startswith(CARD.partition("{")[0])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--steps", type=int, default=11000, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and crops")
    parser.add_argument("--eval-every", type=int, default=1000, help="steps between perplexities")
    parser.add_argument("--plain", action="store_true", help="float32 without torch.compile")
    return parser.parse_args()


def main() -> None:
    """Train, save, measure the saved checkpoint and write its model card."""
    args = parse_args()
    try:
        refuse_existing(args.output, args.overwrite, is_demo_model)
    except QatcError as error:
        raise SystemExit(str(error)) from None
    torch.manual_seed(args.seed)
    texts, held_out = read_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(texts)
    model: Any = build_model(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    stream = token_stream(tokenizer, texts)
    print(f"{model.num_parameters()} parameters, {len(stream)} training tokens", flush=True)
    seconds = train(model, stream, lambda: evaluate(model, tokenizer, held_out), args)
    model = plain_copy(model)
    with complete_directory(
        args.output, overwrite=args.overwrite, replaceable=is_demo_model
    ) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved: Any = AutoModelForCausalLM.from_pretrained(folder)
        dtype, saved = str(saved.dtype).removeprefix("torch."), saved.float()
        held = evaluate(saved, AutoTokenizer.from_pretrained(folder), held_out)
        samples = [sample(saved, tokenizer, p, seed) for seed, p in enumerate(SAMPLE_PROMPTS)]
        machine = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
        facts: dict[str, Any] = {
            "c": saved.config, "args": args, "held": held, "parameters": saved.num_parameters(),
            "files": len(texts), "train_bytes": len("".join(texts).encode()),
            "train_tokens": len(stream), "seen": args.steps * args.batch_tokens,
            "minutes": seconds / 60, "device": f"{machine} (threads: {torch.get_num_threads()})",
            "precision": "float32" if args.plain else "bfloat16 autocast over float32 weights",
            "python": platform.python_version(), "torch": torch.__version__, "dtype": dtype,
            "transformers": transformers.__version__,
        }  # fmt: skip
        (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
        (folder / "README.md").write_text(model_card(facts, samples), encoding="utf-8")
    print(f"held-out perplexity {held.perplexity:.3f}, {held.bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main()
