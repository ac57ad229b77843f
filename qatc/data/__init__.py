"""What is trained on: the corpus that the teacher writes."""

from qatc.data.generate import GenerationConfig

__all__ = ["GenerationConfig"]
