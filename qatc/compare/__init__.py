"""Many runs of ``qatc quantize``, side by side: a grid file in, tables and a page out."""

from qatc.compare.grid import Cell, read_grid

__all__ = ["Cell", "read_grid"]
