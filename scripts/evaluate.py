"""Judge a trained run on held-out activations: the same as `saejax evaluate`, as a file."""

import sys

from saejax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
