"""The command line of saejax."""

from saejax.cli.program import COMMANDS as COMMANDS
from saejax.cli.program import HELP as HELP
from saejax.cli.program import main as main
