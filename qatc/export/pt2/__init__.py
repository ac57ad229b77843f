"""PyTorch's own format: see :mod:`qatc.export.pt2.format`."""
