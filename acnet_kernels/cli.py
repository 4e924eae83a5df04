"""`python -m acnet_kernels COMMAND`: the one place where commands are registered."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from . import __version__, bench, doctor
from .errors import UserError
from .paper.studies import command as study
from .paper.training import command as train
from .paper.training import demo

PROGRAM = "python -m acnet_kernels"


class Command(NamedTuple):
    """A subcommand: its line in the help, what adds its options, what runs it and returns the exit code.

    Its module imports nothing but torch and numpy at the top, so that every other command works without it.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int]


COMMANDS = {
    "train": Command(train.HELP, train.add_arguments, train.main),
    "demo": Command(demo.HELP, demo.add_arguments, demo.main),
    "study": Command(study.HELP, study.add_arguments, study.main),
    "bench": Command(bench.HELP, bench.add_arguments, bench.main),
    "doctor": Command("print what this machine has", lambda parser: None, lambda arguments: doctor.main()),
}


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parser() -> Parser:
    """The command line."""
    top = Parser(PROGRAM, description=__doc__.partition(":")[0] if __doc__ else None)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help, description=command.help))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    2 with one sentence where the user can mend what is wrong, 1 with one where the system refuses.
    """
    arguments = parser().parse_args(argv)
    try:
        code = COMMANDS[arguments.command].main(arguments)
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
