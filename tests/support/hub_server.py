"""A small hub on loopback that lists repositories and gives their files, and fails when it is told to.

It answers huggingface_hub, and modelscope_hub under `/api/v1`.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_verysecrettoken"


class Hub:
    """Repositories by name; the newest revision is a hash of their files.

    Attributes:
        asked: method, path and `Range` of each request for a file.
        cut_after: each answer with a file ends after so many bytes, if it is larger.
        private: names that only who shows the token may see.
    """

    def __init__(self) -> None:
        self._repos: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self._refs: dict[tuple[str, str], dict[str, str]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None
        self.private: set[str] = set()
        self.address = ""

    def put(self, name: str, files: dict[str, bytes], kind: str = "models") -> str:
        """Add a commit to a repository, and return it."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._repos.setdefault((kind, name), {})[commit] = files
        refs = self._refs.setdefault((kind, name), {})
        refs["main"] = refs["master"] = refs[commit] = commit
        return commit

    def put_folder(self, name: str, folder: Path, **more: bytes) -> str:
        """Add the files of a folder, and further ones."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self.put(name, files | more)

    def fetched(self) -> list[str]:
        """The names of the files whose content was given, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET"]

    def answer(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        """Answer one request."""
        path = unquote(urlsplit(handler.path).path).strip("/")
        parts = path.split("/")
        if parts[:2] == ["api", "v1"]:
            return self._answer_modelscope(handler, method, parts[2:])
        kind = "datasets" if "datasets" in parts[:2] else "models"
        is_api = parts[0] == "api"
        rest = parts[2:] if is_api else parts[1:] if kind == "datasets" else parts
        name = "/".join(rest[:2])
        if name in self.private and handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(handler, 401, "RepoNotFound")
        if (kind, name) not in self._repos:
            return self._fail(handler, 404, "RepoNotFound")
        rest = rest[2:] or ["revision", "main"]
        commit = self._refs[kind, name].get(rest[1])
        if commit is None:
            return self._fail(handler, 404, "RevisionNotFound")
        files = self._repos[kind, name][commit]
        if rest[0] == "tree":
            listed: Any = [
                {"type": "file", "path": one, "size": len(data), "oid": _oid(data)}
                for one, data in files.items()
            ]
        elif rest[0] == "revision":
            listed = {"id": name, "sha": commit, "siblings": [{"rfilename": one} for one in files]}
        else:
            return self._give(handler, method, path, files.get("/".join(rest[2:])), commit)
        return _send(handler, 200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _answer_modelscope(self, handler: BaseHTTPRequestHandler, method: str, parts: list[str]) -> None:
        given = {key: one[0] for key, one in parse_qs(urlsplit(handler.path).query).items()}
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        if name in self.private and f"m_session_id={TOKEN}" not in handler.headers.get("Cookie", ""):
            return self._fail(handler, 403, "")
        commit = self._refs.get((kind, name), {}).get(given.get("Revision", "master"))
        if commit is None or not rest:
            return self._fail(handler, 404, "")
        files = self._repos[kind, name][commit]
        if rest == ["repo"]:
            path = given["FilePath"]
            return self._give(handler, method, path, files.get(path), commit)
        listed = [
            {
                "Path": one,
                "Name": one.rpartition("/")[2],
                "Type": "blob",
                "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(),
            }
            for one, data in files.items()
        ]
        body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode()
        return _send(handler, 200, body, {"Content-Type": "application/json"})

    def _give(
        self, handler: BaseHTTPRequestHandler, method: str, path: str, data: bytes | None, commit: str
    ) -> None:
        if data is None:
            return self._fail(handler, 404, "EntryNotFound")
        wanted = handler.headers.get("Range")
        self.asked.append((method, path, wanted))
        head = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if method == "HEAD":
            head["X-Linked-Size"] = str(len(data))
            return _send(handler, 200, b"", head | {"Content-Length": str(len(data))})
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        if wanted:
            head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        head["Content-Length"] = str(len(part))
        if self.cut_after is not None and len(part) > self.cut_after:
            part = part[: self.cut_after]
            handler.close_connection = True
        return _send(handler, 206 if wanted else 200, part, head)

    def _fail(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.close_connection = True
        _send(handler, status, b"", {"X-Error-Code": code, "Content-Length": "0"})


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, head: dict[str, str]) -> None:
    handler.send_response(status)
    for key, value in ({"Content-Length": str(len(body))} | head).items():
        handler.send_header(key, value)
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self, "GET")

        def do_HEAD(self) -> None:
            hub.answer(self, "HEAD")

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{http.server_port}"
    yield hub
    http.shutdown()
    http.server_close()


def settings_for(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    """Return the environment of someone who uses a hub, with a cache of their own."""
    return {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        "MODELSCOPE_ENDPOINT": hub.address, "MODELSCOPE_CACHE": str(cache / "modelscope"),
        "MODELSCOPE_HOME": str(cache), **more,
    }  # fmt: skip


@contextmanager
def using(hub: Hub, cache: Path, **more: str) -> Iterator[None]:
    """Use a hub in this process; libraries that read the environment when they are imported are imported anew."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings_for(hub, cache, **more).items():
            patch.setenv(name, value)
        for name, module in list(sys.modules.items()):
            if module is not None and name.partition(".")[0] in ("huggingface_hub", "modelscope_hub"):
                patch.delitem(sys.modules, name)
        yield
