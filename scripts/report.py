"""Turn a run or a sweep into one HTML page: the same as `saejax report`, as a file."""

import sys

from saejax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["report", *sys.argv[1:]]))
