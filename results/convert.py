"""The JSON files of all runs become a CSV an experiment. Run once; it checks that nothing is lost.

    python results/convert.py          results/runs and results/again -> results/*.csv

Columns: arm, start, again (1: the same run once more on another machine), date, versions, cpu_seconds, then the
settings that differ between the runs of the experiment, named as flags (--lr), then the figures. Settings that all runs
of an experiment share are in results/settings.csv, a column an experiment. A cell is JSON, or a string as it is; an
empty one is absent. Figures keep eight digits.
"""

import csv
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent
EXPERIMENTS = ("erl-text", "erl-overfit", "erl-domains", "erl-still", "erl-real", "answers")


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    return value if isinstance(value, str) else json.dumps(value)


def parse(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def records(experiment: str):
    for folder in ("runs", "again"):
        for path in sorted((FOLDER / folder / experiment).glob("*.json")):
            yield folder == "again", json.loads(path.read_text())


def row_of(again: bool, r: dict, shared: dict) -> dict:
    row = {
        "arm": r["arm"],
        "start": r["start"],
        "again": int(again),
        "date": r["date"],
        **r["versions"],
        "commit": r["versions"]["commit"][:10],
    }
    row["cpu_seconds"] = r["cpu_seconds"]
    row |= {f"--{k.replace('_', '-')}": v for k, v in r["settings"].items() if k not in shared}
    return row | r["figures"]


def main():
    everything = {e: list(records(e)) for e in EXPERIMENTS}
    shared = {}
    for name, found in everything.items():
        settings = [r["settings"] for _, r in found]
        shared[name] = {
            k: v
            for k, v in settings[0].items()
            if all(k in s and s[k] == v and type(s[k]) is type(v) for s in settings)
        }
        rows = [row_of(again, r, shared[name]) for again, r in found]
        columns = list(dict.fromkeys(k for row in rows for k in row))
        ids = ["arm", "start", "again", "date", "commit", "python", "torch", "cpu", "cpu_seconds"]
        columns.sort(key=lambda k: ids.index(k) if k in ids else 100 if k.startswith("--") else 200)  # stable
        with open(FOLDER / f"{name}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows({k: cell(v) for k, v in row.items()} for row in rows)
    flags = list(dict.fromkeys(k for s in shared.values() for k in s))
    with open(FOLDER / "settings.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["setting", *EXPERIMENTS])
        for k in flags:
            table.writerow(
                [f"--{k.replace('_', '-')}", *(cell(shared[e][k]) if k in shared[e] else "" for e in EXPERIMENTS)]
            )
    check(everything)


def check(everything):
    """Every value of every JSON is in the CSV files again: figures to eight digits, all else exactly."""
    with open(FOLDER / "settings.csv", newline="") as file:
        settings = list(csv.DictReader(file))
    counts = {"runs": 0, "figures": 0, "settings": 0, "others": 0}
    for name, found in everything.items():
        with open(FOLDER / f"{name}.csv", newline="") as file:
            rows = {(r["arm"], int(r["start"]), r["again"] == "1"): r for r in csv.DictReader(file)}
        assert len(rows) == len(found)
        for again, r in found:
            row, counts["runs"] = rows[r["arm"], r["start"], again], counts["runs"] + 1
            have = {k: parse(v) for k, v in row.items() if v != ""}
            expected = {"arm", "start", "again", "date", "cpu_seconds", *r["versions"], *r["figures"]}
            for k, v in r["figures"].items():
                assert have[k] == v or abs(have[k] - v) <= 1e-7 * abs(v), (k, have[k], v)
                counts["figures"] += 1
            for k, v in (r["versions"] | {"date": r["date"]}).items():
                assert row[k] == (v[:10] if k == "commit" else v)
                counts["others"] += 1
            assert abs(have["cpu_seconds"] - r["cpu_seconds"]) < 1e-6 and r["experiment"] == name
            own = {s["setting"]: parse(s[name]) for s in settings if s[name] != ""}
            own |= {k: v for k, v in have.items() if k.startswith("--")}
            theirs = {f"--{k.replace('_', '-')}": v for k, v in r["settings"].items()}
            assert own.keys() == theirs.keys() and all(
                own[k] == v and type(own[k]) in (type(v), int, float) for k, v in theirs.items()
            ), (own, theirs)
            counts["settings"] += len(theirs)
            assert {k for k in have if not k.startswith("--")} == expected
            assert not set(r["figures"]) & {"arm", "start", "again", "date", "cpu_seconds", *r["versions"]}
            assert set(r) == {"experiment", "arm", "start", "versions", "date", "figures", "settings", "cpu_seconds"}
    print(counts, "all found in the CSV files")


if __name__ == "__main__":
    main()
