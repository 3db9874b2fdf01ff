"""`python -m saejax`: the command line."""

import sys

from saejax.cli import main

if __name__ == "__main__":
    sys.exit(main())
