"""The main job, from a model to an output."""
