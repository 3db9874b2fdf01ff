"""Metrics of whole representations: arrays of pairs, codes or labels instead of rows through an SAE."""
