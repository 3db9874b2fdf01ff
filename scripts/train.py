"""Train a sparse autoencoder: the same as `saejax train`, as a file."""

import sys

from saejax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
