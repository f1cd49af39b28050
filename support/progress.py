"""How far something is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

from support.errors import say

EVERY = 30.0  # seconds between two lines


class Progress(tqdm):
    """tqdm, which is silent where there is no terminal, and then a line every half a minute (the first soon)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"disable": None, "leave": False, "file": sys.stderr} | kwargs)
        self.what, self.shown = kwargs.get("desc") or "", ""
        self.begun = self.told = time.perf_counter()
        self.timed_from = None  # when the first step ended: it takes longer than the others, and tells little of them
        self.done = self.first = kwargs.get("initial", 0)
        self.whole = kwargs.get("total") or (len(args[0]) if args and hasattr(args[0], "__len__") else None)

    def __iter__(self):
        if not self.disable:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()

    def update(self, n=1):
        super().update(n)
        self.done += n
        now = time.perf_counter()
        if self.timed_from is None:
            self.timed_from, self.first = now, self.done
        elif self.disable and (now - self.told > EVERY or self.told == self.begun and now - self.begun > 3):
            self.told, each = now, (now - self.timed_from) / (self.done - self.first)
            left = each * (self.whole - self.done) if self.whole else 0
            words = [f"{self.what}: {self.done} of {self.whole}", self.shown, f"about {duration(left)} left"]
            say(", ".join(w for w in words if w), sys.stderr)


def duration(seconds: float) -> str:
    """1:05 h, 12 min, 40 s."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
