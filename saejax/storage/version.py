"""Version of saejax, as the package's metadata and every file record it, and the folder of its sources."""

from pathlib import Path

VERSION = "0.1.0"

SOURCES = Path(__file__).parent.parent
