"""A model that runs on integers: its forward, its cache, its decoding program."""
