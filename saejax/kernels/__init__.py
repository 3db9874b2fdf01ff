"""Top-k selection and sparse products over the active latents only, exact on any mesh."""
