"""A server on this machine that answers as the Hugging Face hub does, so that the real client reads from it.

The part of the protocol that downloads use: https://huggingface.co/docs/hub/api. Repositories are folders,
models/OWNER/NAME and datasets/OWNER/NAME; to one that is called "gated" nobody has access.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories of `folder`; gives the address, and the list of the files that were downloaded."""
    downloaded: list[str] = []

    class Handler(_Handler):
        root, log = folder, downloaded

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    log: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "api":
            _, kind, owner, name, *rest = [*parts, "", "", ""]
            repository = self.root / kind / owner / name
            if name == "gated":
                self._refuse(403, "GatedRepo")
            elif not repository.is_dir():
                self._refuse(404, "RepoNotFound")
            else:
                inside = [part for part in rest if part]
                self._json(self._api(repository, f"{owner}/{name}", inside, parse_qs(url.query), body))
            return
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        owner, name, _, _, *inside = parts
        path = self.root.joinpath(kind, owner, name, *inside)
        if not path.is_file():
            self._refuse(404, "EntryNotFound" if (self.root / kind / owner / name).is_dir() else "RepoNotFound")
            return
        if self.command == "GET":
            self.log.append("/".join(inside))
        self._send(path.read_bytes(), "application/octet-stream", {"ETag": f'"{_digest(path)}"'})

    def _api(self, repository: Path, name: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> Any:
        if rest[:1] == ["tree"]:
            pattern = "**/*" if query.get("recursive", ["false"])[0].lower() in ("true", "1") else "*"
            return [self._entry(repository, path) for path in sorted(repository.joinpath(*rest[2:]).glob(pattern))]
        if rest[:1] == ["paths-info"]:
            text = body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            found = [repository / path for path in asked if (repository / path).exists()]
            return [self._entry(repository, path) for path in found]
        files = sorted(path for path in repository.rglob("*") if path.is_file())
        siblings = [{"rfilename": path.relative_to(repository).as_posix()} for path in files]
        return {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []}

    def _entry(self, repository: Path, path: Path) -> dict[str, Any]:
        name = path.relative_to(repository).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": name, "oid": _digest(path), "size": path.stat().st_size}

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), "application/json", {})

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", "application/json", {"X-Error-Code": code, "X-Error-Message": "no"}, status)

    def _send(self, content: bytes, kind: str, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
