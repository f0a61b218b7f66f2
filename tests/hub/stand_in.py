"""A stand-in for the hub on this machine: as much of its HTTP API as huggingface_hub's client asks.

Repositories are commits of files; branches and tags name commits. Files above `LFS` bytes, and
tensors of any size, are uploaded and served as large ones: the batch API, a redirect to where the
bytes are, ranges. Errors carry the hub's own headers (X-Error-Code), by which the client knows
them. Every request is kept in `asked`, so that a test can say what did not happen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = 10_000
LARGE = (".safetensors", ".bin", ".pt", ".gguf", ".onnx")


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes | None], ref: str = "main", message: str = "") -> str:
        """The files of `ref` with these beside and in the place of others; None takes one away."""
        now = dict(self.commits.get(self.refs.get(ref, ""), {}))
        for path, content in files.items():
            if content is None:
                now.pop(path, None)
            else:
                now[path] = content
        text = repr(sorted((p, oid(c)) for p, c in now.items())) + str(len(self.commits)) + ref
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = now
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


def oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > LFS


class Hub:
    """with Hub() as hub: hub.url is the endpoint; hub.tokens are those that it knows."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_write": "write", "hf_read": "read"}
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []      # method, path, range
        self.cut: dict[str, list[int]] = {}     # file: connections that end after so many bytes
        self.broken: int | None = None          # the status of every answer
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.store = f"http://localhost:{port}/objects"     # bytes are at another host

    def __enter__(self) -> Hub:
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(self, name: str, files: dict[str, bytes], **kw) -> Repository:
        made = self.repositories[name] = Repository(**kw)
        made.commit(files)
        return made

    def files(self, name: str, ref: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.at(ref)]

    def fetched(self) -> list[str]:
        """Paths of the files whose bytes somebody took."""
        return [p.partition("/resolve/")[2].partition("/")[2] for m, p, _ in self.asked
                if m == "GET" and "/resolve/" in p]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    # -- answers -----------------------------------------------------------------------------
    def give(self, status: int, body: bytes = b"", kind: str = "application/json",
             **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", headers.pop("Content_Length", str(len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, value: object, status: int = 200, **headers: str) -> None:
        self.give(status, json.dumps(value).encode(), **headers)

    def no(self, status: int, message: str, code: str | None = None) -> None:
        extra = {"X_Error_Code": code} if code else {}
        self.say({"error": message}, status, X_Error_Message=message, **extra)

    # -- requests ----------------------------------------------------------------------------
    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        else:
            self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if self.hub.broken:
            return self.no(self.hub.broken, "the hub is not well")
        said = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.role = self.hub.tokens.get(said)
        if said and self.role is None:
            return self.no(401, "Invalid credentials in Authorization header")
        for methods, pattern, answer in ROUTES:
            if self.command in methods and (found := re.fullmatch(pattern, path)):
                return answer(self, **found.groupdict())
        return self.no(404, f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _chunks(self) -> bytes:
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def repository(self, name: str) -> Repository | None:
        """The repository that may be read, or None after the answer that it may not."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.role is None):
            # who is nobody is not told which names there are
            self.no(404 if self.role else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    def writable(self, name: str) -> Repository | None:
        found = self.repository(name)
        if found is not None and self.role != "write":
            self.no(403 if self.role else 401, "Forbidden: this token cannot write")
            return None
        return found

    def at(self, name: str, rev: str) -> tuple[Repository, str] | None:
        found = self.repository(name)
        if found is None:
            return None
        if (sha := found.at(rev)) is None:
            self.no(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            return None
        return found, sha

    # -- routes ------------------------------------------------------------------------------
    def whoami(self) -> None:
        if self.role is None:
            return self.no(401, "Invalid username or password.")
        self.say({"type": "user", "name": "someone", "fullname": "Someone", "orgs": [],
                  "auth": {"accessToken": {"role": self.role}}})

    def yaml(self) -> None:
        import yaml

        head = json.loads(self.body)["content"].split("---\n")
        said = yaml.safe_load(head[1]) if len(head) > 2 else None
        if not isinstance(said, dict):
            return self.say({"errors": [], "warnings": [{"message": "empty or missing yaml"}]})
        wrong = [f'"{key}" with value "{said[key]}" is not valid' for key, pattern in CARD.items()
                 if key in said and not re.fullmatch(pattern, str(said[key]))]
        self.say({"errors": [{"message": m} for m in wrong], "warnings": []},
                 400 if wrong else 200)

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or "someone"
        name = f"{owner}/{asked['name']}"
        if self.role is None:
            return self.no(401, "Invalid username or password.")
        if self.role != "write":
            return self.no(403, "Forbidden: this token cannot write")
        if name in self.hub.repositories:
            return self.say({"error": "You already created this model repo",
                             "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"},
                     private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.say({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def info(self, name: str, rev: str = "main") -> None:
        if (found := self.at(name, rev)) is None:
            return
        repository, sha = found
        self.say({"_id": "0" * 24, "id": name, "modelId": name, "sha": sha, "tags": [],
                  "private": repository.private, "gated": False, "disabled": False,
                  "downloads": 0, "likes": 0,
                  "siblings": [{"rfilename": p} for p in sorted(repository.commits[sha])]})

    def refs(self, name: str) -> None:
        if (found := self.repository(name)) is not None:
            self.say({"branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
                                   for n, c in found.refs.items()],
                      "converts": [], "tags": [], "pullRequests": []})

    def discussions(self, name: str) -> None:
        if self.repository(name) is not None:
            self.say({"discussions": [], "count": 0, "start": 0})

    def tree(self, name: str, rev: str, under: str | None = None) -> None:
        if (found := self.at(name, rev)) is None:
            return
        repository, sha = found
        out = []
        for path, content in sorted(repository.commits[sha].items()):
            if under and not path.startswith(under + "/"):
                continue
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
            if large(path, len(content)):
                entry["lfs"] = {"oid": oid(content), "size": len(content), "pointerSize": 134}
            out.append(entry)
        self.say(out)

    def branch(self, name: str, rev: str) -> None:
        if (found := self.writable(name)) is None:
            return
        if rev in found.refs:
            return self.no(409, "Reference already exists")
        found.refs[rev] = found.refs["main"]
        self.say({})

    def preupload(self, name: str, rev: str) -> None:
        if self.writable(name) is None or self.at(name, rev) is None:
            return
        self.say({"files": [{"path": f["path"], "shouldIgnore": False,
                             "uploadMode": "lfs" if large(f["path"], f["size"]) else "regular"}
                            for f in json.loads(self.body)["files"]]})

    def batch(self, name: str) -> None:
        if self.writable(name) is None:
            return
        out = []
        for o in json.loads(self.body)["objects"]:
            entry = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}
            out.append(entry)
        self.say({"transfer": "basic", "objects": out})

    def store(self, digest: str) -> None:
        if oid(self.body) != digest:
            return self.no(400, "these are other bytes")
        self.hub.objects[digest] = self.body
        self.give(200)

    def commit(self, name: str, rev: str) -> None:
        if (found := self.writable(name)) is None or self.at(name, rev) is None:
            return
        files: dict[str, bytes | None] = {}
        message = ""
        for line in self.body.splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "header":
                message = value["summary"]
            elif said["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif said["key"] == "deletedFile":
                files[value["path"]] = None
        sha = found.commit(files, rev, message)
        self.say({"success": True, "commitOid": sha, "pullRequestUrl": None,
                  "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def resolve(self, name: str, rev: str, path: str) -> None:
        if (found := self.at(name, rev)) is None:
            return
        repository, sha = found
        if repository.gated:
            return self.no(403, "Access to this model is restricted", "GatedRepo")
        content = repository.commits[sha].get(path)
        if content is None:
            self.say({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound",
                     X_Repo_Commit=sha)
            return
        if large(path, len(content)):
            self.hub.objects[oid(content)] = content
            self.give(302, Location=f"{self.hub.store}/{oid(content)}/{path}",
                      X_Repo_Commit=sha, X_Linked_Size=str(len(content)),
                      X_Linked_Etag=f'"{oid(content)}"', ETag=f'"{blob(content)}"')
            return
        self.bytes(content, path, X_Repo_Commit=sha, ETag=f'"{blob(content)}"')

    def object(self, digest: str, path: str = "") -> None:
        content = self.hub.objects.get(digest)
        if content is None:
            return self.no(404, "no such object")
        self.bytes(content, path, ETag=f'"{digest}"')

    def bytes(self, content: bytes, path: str, **headers: str) -> None:
        start, status = 0, 200
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(asked[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        whole = content[start:]
        cuts = self.hub.cut.get(path) if self.command == "GET" else None
        if not cuts:
            return self.give(status, whole, "application/octet-stream", Accept_Ranges="bytes",
                             **headers)
        self.give(status, whole[:cuts.pop(0)], "application/octet-stream", Accept_Ranges="bytes",
                  Content_Length=str(len(whole)), **headers)
        self.close_connection = True


CARD = {"base_model": r"[\w.-]+/[\w.-]+", "pipeline_tag": r"[a-z]+(-[a-z]+)*",
        "base_model_relation": "adapter|merge|quantized|finetune", "library_name": r"[\w.-]+"}
_NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ({"GET"}, "/api/whoami-v2", _Handler.whoami),
    ({"POST"}, "/api/validate-yaml", _Handler.yaml),
    ({"POST"}, "/api/repos/create", _Handler.create),
    ({"GET"}, f"/api/models/{_NAME}", _Handler.info),
    ({"GET"}, f"/api/models/{_NAME}/revision/(?P<rev>.+)", _Handler.info),
    ({"GET"}, f"/api/models/{_NAME}/refs", _Handler.refs),
    ({"GET"}, f"/api/models/{_NAME}/discussions", _Handler.discussions),
    ({"GET"}, f"/api/models/{_NAME}/tree/(?P<rev>[^/]+)(/(?P<under>.+))?", _Handler.tree),
    ({"POST"}, f"/api/models/{_NAME}/branch/(?P<rev>.+)", _Handler.branch),
    ({"POST"}, f"/api/models/{_NAME}/preupload/(?P<rev>.+)", _Handler.preupload),
    ({"POST"}, f"/api/models/{_NAME}/commit/(?P<rev>.+)", _Handler.commit),
    ({"POST"}, rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ({"PUT"}, r"/objects/(?P<digest>[0-9a-f]{64})", _Handler.store),
    ({"GET", "HEAD"}, r"/objects/(?P<digest>[0-9a-f]{64})/(?P<path>.+)", _Handler.object),
    ({"GET", "HEAD"}, f"/{_NAME}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
