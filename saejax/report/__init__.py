"""HTML reports of run directories: `build` for one run, `build_sweep` for a sweep."""

from saejax.report.latents import Examples, LatentPage, collect
from saejax.report.page import build
from saejax.report.sweep import build_sweep

__all__ = ["Examples", "LatentPage", "build", "build_sweep", "collect"]
