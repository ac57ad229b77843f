"""llama.cpp's format: see :mod:`qatc.export.gguf.format`."""
