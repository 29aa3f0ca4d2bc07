"""The commands of Keel, run in this process: a process of their own takes seconds to start."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from keel.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command has printed, and how it exits."""

    returncode: int
    stdout: str
    stderr: str


def keel(*arguments: object, cwd: str | Path = ".") -> Done:
    """`keel ARGUMENTS` in a folder; an exception that the command would show as a traceback is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["keel", *map(str, arguments)]),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
    return Done(code, out.getvalue(), err.getvalue())
