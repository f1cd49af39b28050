"""The one kind of error that is the user's to mend, and how programs report it."""

import difflib
import os
import signal
import sys
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can mend. Programs print it as one sentence on stderr and exit with status 2."""


def nearest(kind: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    guess = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
    return UserError(f"unknown {kind} {name!r}: did you mean {guess}? There are {', '.join(known)}")


def plainly(function, *args):
    """function(*args), whose ValueError is the user's mistake."""
    try:
        return function(*args)
    except ValueError as error:
        raise UserError(str(error)) from error


def sentence(error: Exception) -> str | None:
    """What to tell the user, on one line whatever it quotes; None where the program is to blame."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "t allocate memory" in str(error)
    ):
        return "out of memory: lower --batch-size, --prompts-per-step, --n-expert or --model"
    return None


def begin_program():
    """For a program's first lines, before it imports torch.

    Nothing is to be saved in those seconds: Ctrl-C ends it, without a traceback. Streams that the shell closed (`2>&-`)
    end in nothing: Python has None for them, which libraries do not expect, and the next file opened would get their
    number, and what a library says to "2".
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))


def say(text: str, stream=None):
    """Print on stdout, or on another stream. Where nobody reads on (`| head`), or there is no room, silence is no
    error: a run goes on and is saved."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python tries once more when it exits
