"""Write a run's parameters in another tool's format: the same as `saejax export`, as a file."""

import sys

from saejax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["export", *sys.argv[1:]]))
