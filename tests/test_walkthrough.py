"""walkthrough.ipynb: its cells run one after the other, and what is stored of them is what they print."""

import contextlib
import io
import json
import re
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
NUMBER = re.compile(r"-?\+?\d+(?:\.\d+)?")


def printed(cell) -> str:
    return "".join("".join(o.get("text", "")) for o in cell["outputs"] if o["output_type"] == "stream")


@pytest.mark.filterwarnings("ignore:.*non-interactive")
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    """Numbers may differ between machines; the words of each output, and the assertions in the cells, may not."""
    names, pictures = {}, 0
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    for cell in CELLS:
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), "walkthrough.ipynb", "exec"), names)
            if "pydocs" not in "".join(cell["source"]) and "letter" not in "".join(cell["source"]):
                assert NUMBER.sub("#", out.getvalue()) == NUMBER.sub("#", printed(cell))
            shown = sum("image/png" in o.get("data", {}) for o in cell["outputs"])
            assert shown == "".join(cell["source"]).count("plt.show()")
            pictures += shown
    assert pictures == 2 and names["gamma"].mean() < 0.999


def test_every_cell_is_short_and_was_run():
    for cell in CELLS:
        assert len(cell["source"]) <= 30
        assert cell["cell_type"] == "markdown" or cell["execution_count"]
