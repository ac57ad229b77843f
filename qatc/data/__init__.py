"""What is trained on: the corpus that the teacher writes."""

from qatc.data.config import CorpusConfig

__all__ = ["CorpusConfig"]
