"""`python -m acnet_kernels COMMAND`: the one place where commands are registered."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from . import __version__
from .errors import UserError

PROGRAM = "python -m acnet_kernels"


class Command(NamedTuple):
    """A subcommand: its line in the help, and the module that adds its options and runs it.

    The module is imported only where the command line names the command, so that no other pays for what it needs,
    and imports nothing but torch and numpy at the top, so that what is missing beyond is told in a sentence.
    """

    help: str
    module: str


COMMANDS = {
    "train": Command("train a network, fold it, check the folded one and report", ".paper.training.command"),
    "demo": Command(
        "train plain and ACNet on small data and compare accuracy, time, memory and folding", ".paper.training.demo"
    ),
    "study": Command(
        "repeat the paper's experiments: ablation, rotation, pruning, magnitudes, shifted, accuracy",
        ".paper.studies.command",
    ),
    "bench": Command("measure blocks, networks, folding and memory against their peers, and report", ".bench"),
    "doctor": Command("print what this machine has", ".doctor"),
}


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parser(words: Sequence[str]) -> Parser:
    """What parses these words: every command, with the options of those that are among them."""
    top = Parser(PROGRAM, description=__doc__.partition(":")[0] if __doc__ else None)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help, description=command.help)
        if name in words:
            module = import_module(command.module, __package__)
            module.add_arguments(one)
            one.set_defaults(run=module.main)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    2 with one sentence where the user can mend what is wrong, 1 with one where the system refuses.
    """
    words = sys.argv[1:] if argv is None else argv
    arguments = parser(words).parse_args(words)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{PROGRAM} {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone: keep the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a directory without permission: no fault of the program's
        where = f"{error.filename}: " if error.filename else ""
        print(f"{PROGRAM} {arguments.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
