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


def end_at_once_on_ctrl_c():
    """For a program to call before it imports torch: nothing is to be saved in those seconds, so no traceback."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def say(text: str):
    """Print on stdout. Where nobody reads on (`| head`), or there is no room, silence is no error: a run is saved."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more when it exits
