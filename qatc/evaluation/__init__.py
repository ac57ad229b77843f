"""How good, and how faithful: metrics, and the parity gate."""
