"""Benchmarks, each a command: ``python -m benchmarks.NAME``. Raw results are in ``results/``."""
