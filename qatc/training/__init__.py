"""The student learns: distillation, its losses, its checkpoints."""

from qatc.training.config import TrainingConfig

__all__ = ["TrainingConfig"]
