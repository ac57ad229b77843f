"""A layer as a graph: captured, shared by its kind, compiled."""
