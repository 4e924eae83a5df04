"""What a person can mend: the command line prints these as one sentence, without a traceback."""

from __future__ import annotations

from importlib.util import find_spec


class UserError(ValueError):
    """A wrong argument, a broken file or a missing package; the message says what is accepted."""


def require(purpose: str, **packages: str) -> None:
    """UserError unless every module can be imported.

    Args:
        purpose: what needs them, the sentence's subject ('plots', 'the digits').
        packages: module name → the package that brings it, all in the 'demo' extra.
    """
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"{purpose} cannot be had: {' and '.join(missing)} {verb} not installed; "
            "pip install 'acnet-kernels[demo]'"
        )
