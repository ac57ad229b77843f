"""The main job, from a model to an output."""

from qatc.quantize.run import quantize
from qatc.quantize.settings import QuantizeConfig

__all__ = ["QuantizeConfig", "quantize"]
