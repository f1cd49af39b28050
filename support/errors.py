"""The one kind of error that is the user's to mend, and how programs report it."""

import contextlib
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


@contextlib.contextmanager
def as_user_error():
    """A ValueError in this block is the user's mistake."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def describe_error(error: Exception) -> str | None:
    """What to tell the user, on one line whatever it quotes; None where the program is to blame."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    kind = type(error).__name__  # of torch's errors, which are not imported here
    if "InvalidCxxCompiler" in kind + str(error):
        return "--compile needs a C++ compiler, and there is none: leave it out, or set CXX"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "t allocate memory" in str(error):
        return "out of memory: lower --batch-size, --prompts-per-step, --n-expert or --model"
    return None


def begin_program():
    """For a program's first lines, before it imports torch: Ctrl-C meanwhile ends it without a traceback.

    What the terminal's encoding lacks is printed as an escape; it must not end a program after its work.
    """
    # PyTorch reads these when it is imported; a user's own setting wins. On Linux it then asks for huge pages for
    # tensors of 2 MB and more: fresh memory, page by page, was 30 % of the time of a layer of 128 experts.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A thread that waits for its team looks 2,000 times (50 us) before it sleeps: 97 % of a step's parallel regions
    # begin sooner. OpenMP's own 300,000 keep a core from the process that it waits for: 4 to 8 times as long a step.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run_program(name: str, program) -> int:
    """Call program() -> exit status: 0, 2 with one sentence on stderr for the user's mistake, 130 for Ctrl-C."""
    try:
        program()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (text := describe_error(error)) is None:
            raise
        print(f"{name}: {text}", file=sys.stderr)
        return 2
