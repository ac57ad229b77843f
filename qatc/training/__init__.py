"""The student learns: distillation, its losses, its checkpoints."""
