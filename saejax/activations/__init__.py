"""Activations: sources, the store, the loader, the shuffle buffer, the normaliser."""
