"""Errors of Keel: each says what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

_OWN = str(Path(__file__).resolve().parent.parent)


class KeelError(Exception):
    """A fault, or (as `UserError`) a mistake; the command prints it without a traceback and exits with `exit_code`.

    Args:
        what: what is wrong, one sentence.
        where: the file, line, key or argument concerned.
        fix: what would be right.
    """

    exit_code = 1

    def __init__(self, what: str, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        stop = "" if not fix or what.endswith((".", "!", "?")) else "."
        super().__init__(": ".join(part for part in (where, what) if part) + (f"{stop} {fix}" if fix else ""))


class UserError(KeelError):
    """Something in the user's hands is wrong: a setting, a file, an argument."""

    exit_code = 2


class ConfigError(UserError):
    """A key or a value of the configuration is wrong."""


class MethodError(UserError):
    """Parts were combined in a way that has no meaning."""


class DataError(UserError):
    """A data file or a data set is malformed."""


class RunError(UserError):
    """A run cannot be started, resumed or found as asked."""


class RewardError(KeelError):
    """A reward function failed in a way that ends the run."""


class CheckpointError(KeelError):
    """A checkpoint is incomplete, damaged, or does not fit the run."""


class TrainingError(KeelError):
    """Training cannot go on: non-finite losses, or no usable groups."""


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """` Did you mean 'x'?` for the choice closest to `word`, or an empty string.

    Args:
        word: as it was written.
        choices: what it may have meant.
        cutoff: the least similarity, of 0 to 1; higher where the word may well have been meant.

    >>> nearest("epsilom", ["epsilon", "beta"])
    " Did you mean 'epsilon'?"
    """
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def describe(error: BaseException, longest: int | None = None) -> str:
    """An exception of another's code in one line: type, words (`longest` characters at most), and where it was raised.

    What Keel itself objects to in that code was raised in no place that would help.

    >>> describe(ValueError("no digits"))
    'ValueError: no digits'
    """
    said = " ".join(str(error).split())[:longest]
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    if not frames or frames[-1].filename.startswith(_OWN):
        return text
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})"
