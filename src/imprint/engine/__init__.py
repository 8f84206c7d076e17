"""What makes a grid cheap: packed texts, fast products, no [B, T, V] tensor, one base for many runs."""
