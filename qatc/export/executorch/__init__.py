"""ExecuTorch's format: see :mod:`qatc.export.executorch.format`."""
