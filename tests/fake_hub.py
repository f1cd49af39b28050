"""A hub on loopback: as much of the Hugging Face API as `datasets.load_dataset` and a model's download ask for.

FakeHub({"owner/name": {"train": [row, ...], "test": [...]}}).url is what HF_ENDPOINT should name; RECORDS has a few
rows of every published set. models: {"owner/name": folder} of files.
"""

import hashlib
import http.server
import io
import json
import os
import re
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


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class FakeHub:
    def __init__(self, repositories: dict[str, dict[str, list[dict]]], models=()):
        """Keys "owner/name", "owner/name:config" (then the files lie in a folder of that name)."""
        self.models = {
            name: {p.name: p.read_bytes() for p in folder.iterdir()} for name, folder in dict(models).items()
        }
        self.files: dict[str, dict[str, bytes]] = {}
        for name, splits in repositories.items():
            repository, _, config = name.partition(":")
            folder = config or "data"
            files = {f"{folder}/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}
            paths = [{"split": s, "path": f"{folder}/{s}-*"} for s in splits]
            card = {"configs": [{"config_name": config or "default", "data_files": paths}]}
            # YAML holds JSON: the card is a YAML header that says which files belong to which split
            self.files[repository] = files | {"README.md": f"---\n{json.dumps(card)}\n---\n".encode()}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub._answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, request) -> None:
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        sets = {f"datasets/{repository}": files for repository, files in self.files.items()}
        for repository, files in (sets | {f"models/{name}": files for name, files in self.models.items()}).items():
            if path.startswith(f"/{repository.removeprefix('models/')}/resolve/"):
                if name := next((f for f in files if path.endswith("/" + f)), None):
                    return self._send(request, files[name], name)
            elif path == f"/api/{repository}" or path.startswith(f"/api/{repository}/revision/"):
                info = {"id": repository, "sha": COMMIT, "private": False, "disabled": False, "gated": False}
                info |= {"tags": [], "downloads": 0, "likes": 0}
                info |= {"siblings": [{"rfilename": f, "size": len(files[f])} for f in files]}
                return self._send(request, json.dumps(info).encode(), "")
            elif match := re.fullmatch(rf"/api/{repository}/(tree|paths-info)/(.*)", path):
                oids = {f: hashlib.sha1(b).hexdigest() for f, b in files.items()}
                entries = [{"type": "file", "path": f, "size": len(files[f]), "oid": oids[f]} for f in files]
                folders = sorted({f.rpartition("/")[0] for f in files} - {""})
                entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
                if match[1] == "paths-info":
                    form = urllib.parse.parse_qs(body.decode())
                    wanted = form.get("paths") or json.loads(body or b"{}").get("paths", [])
                    entries = [e for e in entries if e["path"] in wanted]
                else:  # tree/<revision>[/<folder>]: an entry of that folder, or of those below it
                    folder = next((f for f in folders if match[2].endswith("/" + f)), "")
                    entries = [e for e in entries if e["path"].startswith(folder + "/" if folder else "")]
                return self._send(request, json.dumps(entries).encode(), "")
        request.send_response(404)
        request.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request, content: bytes, name: str) -> None:
        start, end = 0, len(content)
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            start, end = int(ranged[1]), int(ranged[2] or len(content) - 1) + 1
        request.send_response(206 if ranged else 200)
        request.send_header("Content-Length", str(len(content[start:end])))
        request.send_header("Content-Type", "application/json" if not name else "application/octet-stream")
        if ranged:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if name:
            request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[start:end])


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
