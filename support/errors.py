"""The one kind of error that is the user's to mend."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can mend. Programs print it as one sentence on stderr and exit with status 2."""


def nearest(kind: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    guess = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
    return UserError(f"unknown {kind} {name!r}: did you mean {guess!r}? There are {', '.join(known)}")
