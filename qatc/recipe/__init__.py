"""What is quantized, and how: specs, targets, recipes."""

from qatc.recipe.recipe import Recipe
from qatc.recipe.spec import QuantSpec

__all__ = ["QuantSpec", "Recipe"]
