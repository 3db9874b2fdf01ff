"""Experiments of the papers, superposition codes, and metrics of whole representations."""
