"""Sparse autoencoders: one file per architecture, `base` for what they share, `model` for what users hold."""
