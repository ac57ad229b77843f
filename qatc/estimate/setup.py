"""What a run's memory and time depend on, besides the model: the options of ``qatc quantize``."""

from __future__ import annotations

from dataclasses import dataclass

from qatc.errors import ConfigError

CHOICES = {
    "compute": ("bfloat16", "float32"),
    "master_dtype": ("float32", "bfloat16"),
    "optimizer": ("adamw", "adamw8bit"),
    "offload": ("none", "optimizer", "parameters"),
    "teacher": ("online", "recorded"),
    "train": ("full", "lora"),
}
"""What the fields that are words may be."""


@dataclass(frozen=True)
class Setup:
    """A run, as far as memory, time and disk depend on it.

    Args:
        compute: dtype that both models compute in; the teacher is held in it.
        weight_bits: of the layers' matrices in the output.
        integer_forward: whether the student computes on int8 codes.
        compile: whether graphs are compiled.
        on_gpu: whether the models are on a GPU, beside which the host has memory of its own.
        gpus: how many share the work and the student.
        divided: whether they share both models out wherever one is run, and not only while the
            student is trained, see :func:`qatc.quantize.given.why_whole`.
        batch_size: rows of a forward pass, on all GPUs together.
        accumulate: forward passes of a step.
        max_length: tokens of a row.
        steps: of training.
        samples: sequences of the corpus.
        eval_samples: those of them that are held out.
        slots: sequences that are written side by side on a GPU; ``None`` for as many as
            :func:`qatc.data.slots.choose_slots` would take at most.
        written_before: whether generate-data writes the corpus, with the device to itself.
        train_embeddings: whether embedding and head are trained as well.
        keep_checkpoints: on the disk.
        verify: whether the output is held against what was trained, on the same device.
        teacher: ``online``, or ``recorded``: then there is none while the student is trained, and
            no student while the corpus is made.
        optimizer: ``adamw``, or ``adamw8bit`` with its state in 8 bits.
        master_dtype: of the student's parameters and gradients.
        loss_chunk: tokens whose logits are there at a time; 0 for all, ``None`` for chunks where
            logits are large.
        checkpoint_activations: keep a layer's input alone, and compute the rest again.
        fused_step: step one tensor at a time within the backward pass.
        offload: what is kept in the host's memory.
        train: ``full``, or ``lora`` with updates of a rank in the place of weights.
        lora_rank: of these.
        closed: fields that no option may be chosen for, and options that may not be.

    Raises:
        ConfigError: a value is out of range, or options exclude each other.
    """

    compute: str = "bfloat16"
    weight_bits: int = 4
    integer_forward: bool = True
    compile: bool = True
    on_gpu: bool = True
    gpus: int = 1
    divided: bool = True
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 256
    steps: int = 1500
    samples: int = 4096
    eval_samples: int = 256
    slots: int | None = None
    written_before: bool = False
    train_embeddings: bool = True
    keep_checkpoints: int = 2
    verify: bool = True
    teacher: str = "online"
    optimizer: str = "adamw"
    master_dtype: str = "float32"
    loss_chunk: int | None = None
    checkpoint_activations: bool = False
    closed: tuple[str, ...] = ()
    fused_step: bool = False
    offload: str = "none"
    train: str = "full"
    lora_rank: int = 16

    def __post_init__(self) -> None:
        counts = ("gpus", "batch_size", "accumulate", "max_length", "steps", "samples")
        for name in (*counts, "eval_samples", "keep_checkpoints", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.slots is not None and self.slots < 1:
            raise ConfigError(f"slots must be at least 1, or auto; got {self.slots}")
        if self.loss_chunk is not None and self.loss_chunk < 0:
            raise ConfigError(f"loss_chunk must not be negative; got {self.loss_chunk}")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}"
                )
        if self.batch_size % self.gpus:
            raise ConfigError(
                f"a batch of {self.batch_size} rows cannot be shared by {self.gpus} GPUs; choose a"
                " multiple (--batch-size)"
            )
        if self.train == "lora" and self.gpus > 1:
            raise ConfigError(
                f"updates of rank {self.lora_rank} are trained by one process, and there are"
                f" {self.gpus} GPUs; ask for one, or leave out --train lora"
            )
        if self.train == "lora" and self.offload == "parameters":
            raise ConfigError(
                "--offload parameters is of weights that are trained themselves; leave it out, or"
                " --train lora"
            )
        if self.fused_step and self.accumulate > 1:
            raise ConfigError(
                f"a fused step keeps no gradients to add up over {self.accumulate} passes; leave"
                " out --fused-step, or accumulate once"
            )

    @property
    def streams(self) -> bool:
        """Whether parameters come from the host's memory, layer by layer."""
        return self.offload == "parameters" and self.on_gpu

    @property
    def shares_out(self) -> bool:
        """Whether GPUs share models out wherever one is run."""
        return self.divided and self.gpus > 1 and self.offload != "parameters"

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.compute == "bfloat16" else 4

    @property
    def master(self) -> int:
        """Bytes of a master, and of its gradient."""
        return 2 if self.master_dtype == "bfloat16" else 4

    @property
    def moments(self) -> float:
        """Bytes of the optimizer's state for a parameter."""
        return 8.0 if self.optimizer == "adamw" else 2.1

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass on one GPU."""
        return self.batch_size // self.gpus * self.max_length
