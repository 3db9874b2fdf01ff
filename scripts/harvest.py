"""Write the activations of a language model to a store: the same as `saejax harvest`, as a file."""

import sys

from saejax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["harvest", *sys.argv[1:]]))
