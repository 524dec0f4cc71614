"""A server that speaks as much of the Hugging Face hub's protocol as a download needs, for models in folders.

    python hub_server.py FOLDER     serves FOLDER/organisation/name/* and prints its port

A model named `gated` lists its files and gives none.
"""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers for the folder of the server."""

    root: Path

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""

    def _answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "models", organisation, name, *rest] if (self.root / organisation / name).is_dir():
                self._describe(self.root / organisation / name, rest)
            case ["api", *_]:
                self._refuse(404, "RepoNotFound")
            case [organisation, name, "resolve", _, *path] if name != "gated":
                self._send_file(self.root.joinpath(organisation, name, *path))
            case _:
                self._refuse(403, "GatedRepo")

    def _describe(self, folder: Path, rest: list[str]) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if "revision" in rest and rest[1] not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif "tree" in rest:
            self._send_json(
                [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                    for name, path in zip(names, files, strict=True)
                ]
            )
        else:
            model = "/".join(folder.parts[-2:])
            self._send_json({"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})

    def _send_file(self, file: Path) -> None:
        if file.is_file():
            self._send(200, file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})
        else:
            self._refuse(404, "EntryNotFound")

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
