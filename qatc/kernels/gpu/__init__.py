"""Triton kernels for NVIDIA GPUs: products with packed codes, and attention to a cache of codes.

``launch`` says where they run, ``products`` and ``attention`` are ops that choose a shape of the
work by the sizes of their arguments and start the kernels of ``product_kernels`` and
``attention_kernels``, which alone import Triton.
"""
