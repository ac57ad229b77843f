"""The model side: loading from a hub or a directory, and finding what is to be captured."""

from qatc.models.load import LoadedModel, load_config, load_model, load_skeleton, load_tokenizer
from qatc.models.regions import find_regions, is_transformers_model

__all__ = [
    "LoadedModel",
    "load_config",
    "load_skeleton",
    "find_regions",
    "is_transformers_model",
    "load_model",
    "load_tokenizer",
]
