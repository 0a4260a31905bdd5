"""The public functions: argument checks, then a fused operator with its gradient, or the reference."""
