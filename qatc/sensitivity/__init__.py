"""What it costs to quantize one part of a model alone, and which bits that makes worth it."""

from qatc.sensitivity.budget import BitChoice, choose_bits, fit_budget
from qatc.sensitivity.overview import Sensitivity, inspect_sensitivity, measure_sensitivity
from qatc.sensitivity.parts import part_sensitivity
from qatc.sensitivity.weights import weight_sensitivity

__all__ = [
    "BitChoice",
    "Sensitivity",
    "choose_bits",
    "fit_budget",
    "inspect_sensitivity",
    "measure_sensitivity",
    "part_sensitivity",
    "weight_sensitivity",
]
