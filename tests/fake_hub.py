"""A hub on loopback: as much of the Hugging Face API as `datasets.load_dataset` and a model's download ask for.

FakeHub({"owner/name": {"train": [row, ...], "test": [...]}}).url is what HF_ENDPOINT should name; RECORDS has a few
rows of every published set. models: {"owner/name": folder} of files.
"""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from pathlib import Path

import pyarrow
import pyarrow.parquet

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPLITS, ANSWERS = ("train", "validation", "test"), {"text": ["a", "the b"], "answer_start": [0, 1]}
RECORDS = {  # as the hub's tables have them, columns that we do not use included
    "Salesforce/wikitext:wikitext-2-raw-v1": {s: [{"text": t} for t in ("", " = title = \n", "")] for s in SPLITS},
    "knkarthick/samsum": {s: [{"id": "1", "dialogue": f"A:\r\n{s}", "summary": "S."}] for s in SPLITS},
    "EdinburghNLP/xsum": {s: [{"document": f"D {s}", "summary": "S.", "id": "1"}] for s in SPLITS},
    "rajpurkar/squad": {
        "train": [{"title": "t", "context": f"c{i % 50}", "question": "q?", "answers": ANSWERS} for i in range(100)],
        "validation": [{"title": "t", "context": "dev", "question": "q?", "answers": ANSWERS}],
    },
    "openai/gsm8k:main": {
        "train": [{"question": f"q{i}", "answer": "#### 2"} for i in range(100)],
        "test": [{"question": "q", "answer": "x\n#### 1,000"}],
    },
    "agentica-org/DeepScaleR-Preview-Dataset": {"train": [{"problem": f"p{i}", "answer": "1"} for i in range(100)]},
    "HuggingFaceH4/MATH-500": {"test": [{"problem": "p", "answer": "\\frac{1}{2}", "level": 1}]},
    "HuggingFaceH4/aime_2024": {"train": [{"problem": "p", "answer": "025"}]},
    "math-ai/aime25": {"test": [{"problem": "p", "answer": "70"}]},
    "math-ai/minervamath": {"test": [{"question": "p", "answer": "8.7e8"}]},
    "math-ai/olympiadbench": {"test": [{"question": "p", "final_answer": ["1", "3"], "solution": ["s"]}]},
}


def published(splits: dict[str, list[dict]], config: str) -> dict[str, bytes]:
    """The files of a data set, in a folder of its configuration's name."""
    folder, files = config or "data", {}
    for split, rows in splits.items():
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        files[f"{folder}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    paths = [{"split": s, "path": f"{folder}/{s}-*"} for s in splits]
    card = {"configs": [{"config_name": config or "default", "data_files": paths}]}
    # YAML holds JSON: the card is a YAML header that says which files belong to which split
    return files | {"README.md": f"---\n{json.dumps(card)}\n---\n".encode()}


class FakeHub(http.server.ThreadingHTTPServer):
    def __init__(self, repositories: dict[str, dict[str, list[dict]]], models=()):
        """Keys "owner/name" or "owner/name:config"."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files = {}  # of each repository, by its name in an address of the API
        for name, folder in dict(models).items():
            self.files[f"models/{name}"] = {p.name: p.read_bytes() for p in folder.iterdir()}
        for name, splits in repositories.items():
            repository, _, config = name.partition(":")
            self.files[f"datasets/{repository}"] = published(splits, config)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        for repository, files in self.server.files.items():
            resolve, api = f"/{repository.removeprefix('models/')}/resolve/", f"/api/{repository}"
            if path.startswith(resolve):
                if name := next((f for f in files if path.endswith("/" + f)), None):
                    return self.answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')
            elif path == api or path.startswith(api + "/revision/"):
                info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return self.answer(json.dumps(info).encode())
            elif path.startswith(api + "/tree/"):  # tree/<revision>[/<folder>]: the files in that folder
                folder = path.removeprefix(api + "/tree/").partition("/")[2]
                entries = [{"type": "file", "path": f, "size": len(x), "oid": COMMIT} for f, x in files.items()]
                entries += [{"type": "directory", "path": os.path.dirname(f), "oid": COMMIT} for f in files]
                entries = [e for e in entries if e["path"] and os.path.dirname(e["path"]) == folder]
                return self.answer(json.dumps(entries).encode())
        self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, content: bytes, status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def in_a_new_python(code, home, **env):
    """Runs code that prints JSON: HF_ENDPOINT and the like are read once, when the libraries are imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env = kept | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | env
    code = f"""
import json, os, sys, data
def attempt(function, *arguments):
    try:
        return function(*arguments)
    except data.UserError as error:
        return str(error)
{textwrap.dedent(code)}
sys.stdout.flush()
os._exit(0)  # the libraries' threads can abort an interpreter that is shutting down"""
    how = dict(cwd=Path(__file__).parents[1], text=True, capture_output=True, timeout=900)
    run = subprocess.run([sys.executable, "-c", code], env=env, **how)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]), run.stderr
