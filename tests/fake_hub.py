"""A hub on loopback: as much of the Hugging Face API as `datasets.load_dataset` asks for, over Parquet files in memory.

FakeHub({"owner/name": {"train": [row, ...], "test": [...]}}).url is what HF_ENDPOINT should name
"""

import hashlib
import http.server
import io
import json
import re
import threading
import urllib.parse

import pyarrow
import pyarrow.parquet

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class FakeHub:
    def __init__(self, repositories: dict[str, dict[str, list[dict]]]):
        """Keys "owner/name", "owner/name:config" (then the files lie in a folder of that name)."""
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        for name, splits in repositories.items():
            repository, _, config = name.partition(":")
            folder = config or "data"
            files = {f"{folder}/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}
            card = {
                "configs": [
                    {
                        "config_name": config or "default",
                        "data_files": [{"split": s, "path": f"{folder}/{s}-*"} for s in splits],
                    }
                ]
            }
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
        self.asked.append(f"{request.command} {path}")
        for repository, files in self.files.items():
            if path.startswith(f"/datasets/{repository}/resolve/"):
                name = next((f for f in files if path.endswith("/" + f)), None)
                if name:
                    return self._send(request, files[name], name)
            elif path == f"/api/datasets/{repository}" or path.startswith(f"/api/datasets/{repository}/revision/"):
                siblings = [{"rfilename": f, "size": len(b)} for f, b in files.items()]
                return self._json(
                    request,
                    {
                        "id": repository,
                        "sha": COMMIT,
                        "siblings": siblings,
                        "private": False,
                        "disabled": False,
                        "gated": False,
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                    },
                )
            elif match := re.fullmatch(rf"/api/datasets/{repository}/(tree|paths-info)/(.*)", path):
                entries = [self._entry(f, b) for f, b in files.items()]
                folders = sorted({f.rpartition("/")[0] for f in files} - {""})
                entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
                if match[1] == "paths-info":
                    form = urllib.parse.parse_qs(body.decode())
                    wanted = form.get("paths") or json.loads(body or b"{}").get("paths", [])
                    entries = [e for e in entries if e["path"] in wanted]
                else:  # tree/<revision>[/<folder>]: an entry of that folder, or of those below it
                    folder = next((f for f in folders if match[2].endswith("/" + f)), "")
                    entries = [e for e in entries if e["path"].startswith(folder + "/" if folder else "")]
                return self._json(request, entries)
        request.send_response(404)
        request.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _entry(self, name: str, content: bytes) -> dict:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, request, value) -> None:
        self._send(request, json.dumps(value).encode(), "")

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
