"""Runs: a config to a run directory and back, the state of a directory, ensembles of runs."""
