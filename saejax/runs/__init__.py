"""Runs: a config to a run directory and back, what a directory holds, ensembles of runs."""
