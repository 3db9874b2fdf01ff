"""Processes, signals, mesh and placement of arrays."""
