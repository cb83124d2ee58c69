"""As much of the hub's HTTP API, on this machine, as an upload needs."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecret"


class FakeHub(ThreadingHTTPServer):
    """Knows one token, takes every repository of its owner ``me``, and keeps what is uploaded.

    Attributes:
        files: path → content, by commits and by uploads of large files.
        created: the documents that repositories were asked for with.
        branches: the branches that were made.
        commits: the branch of each commit.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.commits: list[str] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a hub while the body runs."""
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            self._reply({"error": "Repository not found"}, 404)
        elif self._known():
            self._reply({"name": "me", "type": "user", "auth": {"type": "access_token"}})

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif self._known():
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                self._create(json.loads(body))
            elif path.endswith("/info/lfs/objects/batch"):
                self._batch(json.loads(body))
            elif "branch" in parts:
                self.server.branches.append(parts[-1])
                self._reply({})
            elif "preupload" in parts:
                files = [self._mode(file["path"]) for file in json.loads(body)["files"]]
                self._reply({"files": files})
            elif "commit" in parts:
                self._commit(body, parts[-1])
            else:
                self._reply({}, 404)

    def _known(self) -> bool:
        known = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if not known:
            self._reply({"error": "Invalid credentials"}, 401)
        return known

    def _create(self, wanted: dict[str, Any]) -> None:
        if (wanted.get("organization") or "me") != "me":
            self._reply({"error": "You don't have the rights"}, 403)
            return
        self.server.created.append(wanted)
        self._reply({"url": f"{self.server.url}/me/{wanted['name']}"})

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.server.url}/blobs/{item['oid']}"}},
            }
            for item in wanted["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes, branch: str) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.commits.append(branch)
        url = f"{self.server.url}/me/x/commit/1"
        self._reply({"success": True, "commitUrl": url, "commitOid": "1" * 40})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _reply(self, document: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
