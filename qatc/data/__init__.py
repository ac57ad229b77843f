"""What is trained on: the corpus that the teacher writes."""

from qatc.data.config import GenerationConfig

__all__ = ["GenerationConfig"]
