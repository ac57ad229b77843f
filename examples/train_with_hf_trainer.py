"""Train the quantized graph in transformers' Trainer, and write what was trained as an output."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import qatc


class Distillation(Trainer):
    """Lowers the KL divergence to a teacher in place of the loss on labels."""

    def __init__(self, teacher: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.eval().to(self.args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean KL(teacher || model) over all tokens that have a label."""
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**asked, use_cache=False)
        with torch.no_grad():
            wanted = self.teacher(**asked, use_cache=False).logits
        counted = inputs["labels"] != -100
        loss = kl(outputs.logits[counted], wanted[counted])
        return (loss, outputs) if return_outputs else loss


def kl(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || logits) of ``[N, V]``, in nats per token."""
    own, others = (log_softmax(each.float(), -1) for each in (logits, wanted))
    return kl_div(own, others, reduction="batchmean", log_target=True)


class Losses(TrainerCallback):
    """Keeps the losses that are logged."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called by the Trainer."""
        if logs and "loss" in logs:
            self.found.append(logs["loss"])


def main(model: str, text: str, output: str, steps: int = 100, length: int = 128) -> None:
    """Train ``model`` for 4-8-4 on a text file, and write it into the directory ``output``."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)
    )
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"]
    rows = [{"input_ids": ids[i : i + length]} for i in range(0, len(ids) - length + 1, length)]

    qatc.prepare(student, qatc.Recipe.from_bits("4-8-4"), compile=False)
    losses = Losses()
    Distillation(
        teacher,
        model=student,
        args=TrainingArguments(
            output_dir=f"{output}.trainer",
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[losses],
    ).train()
    print(f"KL {losses.found[0]:.4f} at first, {losses.found[-1]:.4f} at the end")
    print(f"written: {qatc.save(student, output, tokenizer=tokenizer, overwrite=True)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
