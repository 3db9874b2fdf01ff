"""Exact top-k selection and sparse products over the active latents, on any mesh."""
