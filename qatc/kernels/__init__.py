"""How codes are multiplied, looked up and attended to."""
