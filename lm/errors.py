"""Errors a person can act on: each message is one line of rule, value and remedy.

Programs print the line and exit 2. Our own mistakes are asserts and ordinary exceptions, with a traceback.
"""

import re


class UserError(ValueError):
    """What was asked for cannot be done as asked; the message says why and what would work."""


class DivergedError(RuntimeError):
    """Training met a loss or a gradient that is not finite, and stopped before it could be averaged away."""


class LeakError(UserError):
    """The model sees what it is to predict, or is measured on what it was trained on."""


class LostRankError(Exception):
    """Another process of a training in several has ended, or cannot be reached."""


def masked(text: str) -> str:
    """The text with stars in place of the password of each URI in it."""
    return re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", text)
