"""The student learns: distillation, its losses, its checkpoints."""

from qatc.training.distill import TrainingConfig

__all__ = ["TrainingConfig"]
