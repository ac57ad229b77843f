"""Decoding on a GPU: a step as one CUDA graph, and a loop that waits for no token."""
