"""Numbers in: sources of activations, the store, the loader, the shuffle buffer, the normaliser."""
