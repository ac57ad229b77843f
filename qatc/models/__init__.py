"""The model side: loading from a hub or a directory, and finding what is to be captured."""

from qatc.models.load import LoadedModel, load_model, load_tokenizer
from qatc.models.regions import find_regions, is_transformers_model

__all__ = ["LoadedModel", "find_regions", "is_transformers_model", "load_model", "load_tokenizer"]
