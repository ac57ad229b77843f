"""What the machine has: processor, device, compilers, and the signals that it sends."""
