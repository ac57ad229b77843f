"""What is quantized, and how: specs, targets, recipes."""
