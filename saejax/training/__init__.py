"""Learning: optimiser, liveness, the one compiled step, and the loop around it."""
