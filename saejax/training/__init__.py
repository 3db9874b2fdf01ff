"""Training: optimiser, liveness, the compiled step, and the loop around it."""
