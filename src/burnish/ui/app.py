"""The routes. What a request may carry is looked at here and in places.py and runs.py; who may ask,
in guard.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..core.errors import BurnishError, ConfigError
from ..core.reading import parse_json
from .asking import Desk
from .guard import Guard
from .places import Missing, Places, Refused
from .runs import OUT, READING, Runs
from .settings import as_shown, told
from .uploads import KINDS, TooMuch, Uploads

#: bytes of a question, and of a picture or a sound that is asked about
QUESTION, MEDIUM = 1 << 20, 1 << 25
#: what it is sent as, and the ending of its name here
MEDIA = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif",
         "image/bmp": ".bmp", "image/tiff": ".tiff", "audio/wav": ".wav", "audio/x-wav": ".wav",
         "audio/wave": ".wav", "audio/flac": ".flac", "audio/x-flac": ".flac",
         "audio/ogg": ".ogg", "audio/mpeg": ".mp3", "audio/opus": ".opus", "audio/aiff": ".aiff",
         "text/csv": ".csv", "text/tab-separated-values": ".tsv", "application/jsonl": ".jsonl"}
#: texts that a picture is compared with, and letters of each
TEXTS, LETTERS = 50, 500
#: seconds between two looks at a run's files, and after which a silent stream says that it lives
LOOK, BEAT = 0.4, 15.0
PAGE = {"page.css": "text/css", **{f"{name}.js": "text/javascript" for name in (
    "app", "ask", "chart", "pick", "run", "settings", "try")}}
#: a report is a page of its own: it may show, and run nothing
SHOWN = ("sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
         "frame-ancestors 'none'")


@dataclass
class Ui:
    """What the routes share. `desk` answers; tests put another there."""

    places: Places
    trust: bool = False
    limit: int | None = None
    desk: Any = field(default_factory=Desk)
    trying: Any = field(default_factory=Desk)

    def __post_init__(self) -> None:
        self.runs = Runs(self.places, self.trust)
        self.uploads = Uploads(self.places, *([] if self.limit is None else [self.limit]))

    @property
    def tops(self) -> list[str]:
        return [str(self.places.root), str(self.places.runs)]

    # -- the page ------------------------------------------------------------------------------
    async def index(self, request: Request) -> Response:
        return Response(_page("index.html"), media_type="text/html")

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in PAGE:
            raise Missing("there is no such file")
        return Response(_page(name), media_type=PAGE[name])

    async def here(self, request: Request) -> Response:
        """What the page should know of this server."""
        return JSONResponse({
            "root": self.places.root.name or str(self.places.root), "kinds": sorted(KINDS),
            "limit": self.uploads.limit, "trust": self.trust, "fields": as_shown()})

    # -- looking -------------------------------------------------------------------------------
    async def browse(self, request: Request) -> Response:
        path = request.query_params.get("path", "")
        return JSONResponse(await run_in_threadpool(self.places.browse, path))

    async def ask(self, request: Request) -> Response:
        """model, data, plan or check: lines of JSON, the last one with ``answer`` or ``error``."""
        what, given = request.path_params["what"], await _question(request)
        asked = await run_in_threadpool(self._asked, what, given)

        async def lines() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(self.desk.ask(what, asked)) as messages:
                async for message in messages:
                    yield json.dumps(message).encode() + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    def _asked(self, what: str, given: dict[str, Any]) -> dict[str, Any]:
        """What the desk is asked: places as paths, and nothing that is not known."""
        if what == "machine":
            return _only(given, {})
        kinds: dict[str, Any] = {"model": str}
        if what == "data":
            kinds |= {"data": str, "how": dict, "settings": dict}
        elif what == "check":
            kinds |= {"data": str, "how": dict, "settings": dict, "recipe": str}
        elif what == "plan":
            kinds |= {"memory": str, "batch": int, "length": int, "task": str, "labels": list,
                      "prefer": str, "device": str, "rows": int, "epochs": float,
                      "candidates": list, "data": str, "how": dict, "settings": dict}
        elif what != "model":
            raise Missing("there is no such question")
        asked = _only(given, kinds)
        for key in ("model", "data"):
            if key in asked:
                asked[key] = self.places.named(asked[key])
        if "data" in asked:
            asked["tops"] = self.tops
            asked["how"] = _only(asked.get("how", {}), dict.fromkeys(READING, str))
        if "settings" in asked:
            asked["settings"] = told(asked["settings"])
        for key in ("labels", "candidates"):
            if any(not isinstance(v, str) or len(v) > 2000 for v in asked.get(key, ())):
                raise ConfigError(f"{key}: expected a list of texts")
        return {**asked, "trust": self.trust}

    # -- uploads -------------------------------------------------------------------------------
    async def upload(self, request: Request) -> Response:
        return JSONResponse({"id": await run_in_threadpool(self.runs.new)})

    async def take(self, request: Request) -> Response:
        length = request.headers.get("content-length", "")
        size = await self.uploads.take(
            request.path_params["id"], request.path_params["path"], request.stream(),
            int(length) if length.isdigit() else None)
        return JSONResponse({"size": size})

    async def drop(self, request: Request) -> Response:
        await run_in_threadpool(self.runs.drop, request.path_params["id"])
        return JSONResponse({})

    # -- runs ----------------------------------------------------------------------------------
    async def all(self, request: Request) -> Response:
        return JSONResponse({"runs": await run_in_threadpool(self.runs.all)})

    async def start(self, request: Request) -> Response:
        given = await _question(request)
        name = await run_in_threadpool(self.runs.start, given)
        await self.trying.end()                         # its memory is the run's now
        return JSONResponse(await run_in_threadpool(self.runs.state, name), status_code=201)

    async def state(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.runs.state, request.path_params["id"]))

    async def stop(self, request: Request) -> Response:
        await run_in_threadpool(self.runs.stop, request.path_params["id"])
        return await self.state(request)

    async def resume(self, request: Request) -> Response:
        await run_in_threadpool(self.runs.resume, request.path_params["id"])
        await self.trying.end()
        return await self.state(request)

    async def events(self, request: Request) -> Response:
        """Server-sent events: all rows so far, then what is new, until the run is over."""
        watch = self.runs.watch(request.path_params["id"])
        first = await run_in_threadpool(lambda: list(watch.news()))

        async def lines() -> AsyncIterator[str]:
            new, silent = first, 0.0
            while True:
                if new:
                    yield "".join(f"event: {kind}\ndata: {json.dumps(value)}\n\n"
                                  for kind, value in new)
                    silent = 0.0
                elif (silent := silent + LOOK) > BEAT:
                    yield ": still here\n\n"
                    silent = 0.0
                if watch.over and not new:
                    yield "event: over\ndata: null\n\n"
                    return
                await asyncio.sleep(LOOK if not watch.over else 0)
                try:
                    new = await run_in_threadpool(lambda: list(watch.news()))
                except Missing:                      # somebody removed the folder
                    yield "event: gone\ndata: null\n\n"
                    return

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def report(self, request: Request) -> Response:
        page = self.runs.folder(request.path_params["id"]) / OUT / "report.html"
        if not page.is_file():
            raise Missing("this run has no report yet")
        return Response(page.read_bytes(), media_type="text/html",
                        headers={"content-security-policy": SHOWN})

    async def adapter(self, request: Request) -> Response:
        """The run's folder without its checkpoints, as a zip."""
        name = request.path_params["id"]
        out = self.runs.folder(name) / OUT
        if not (out / "adapter_model.safetensors").is_file():
            raise Missing("this run has no adapter yet")
        zipped = await run_in_threadpool(_zipped, out)
        return StreamingResponse(_pieces(zipped), media_type="application/zip", headers={
            "content-disposition": f'attachment; filename="adapter-{name}.zip"',
            "content-length": str(os.fstat(zipped.fileno()).st_size)})

    async def predict(self, request: Request) -> Response:
        """A text (JSON: text, tokens); a picture, a sound or a table (the body, with its type);
        beside a picture the texts that it is compared with (``text`` in the query)."""
        out = self.runs.folder(request.path_params["id"]) / OUT
        if not (out / "run.json").is_file():
            raise Missing("this run is not finished, so it has no answers yet")
        kind = request.headers.get("content-type", "").partition(";")[0]
        with contextlib.ExitStack() as stack:
            if kind.startswith(("image/", "audio/")) or kind in MEDIA:
                if kind not in MEDIA:
                    raise ConfigError(f"{kind[:60]} is not read here; {', '.join(MEDIA)} are")
                file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=MEDIA[kind]))
                file.write(await _body(request, MEDIUM))
                file.flush()
                asked: dict[str, Any] = {"file": file.name}
                if texts := request.query_params.getlist("text"):
                    if len(texts) > TEXTS or any(len(t) > LETTERS for t in texts):
                        raise ConfigError(f"a picture is compared with up to {TEXTS} texts of "
                                          f"{LETTERS} letters each")
                    asked["texts"] = texts
            else:
                given = _only(await _question(request), {"text": str, "tokens": int})
                text = given.get("text", "")
                if not text.strip():
                    raise ConfigError("there is nothing to answer")
                asked = {"text": text, "tokens": max(1, min(given.get("tokens", 64), 1024))}
            answer = await self.trying.one("predict", {"run": str(out), **asked})
        if "error" in answer:
            return JSONResponse(answer, status_code=400)
        return JSONResponse(answer["answer"])

    async def close(self) -> None:
        await self.desk.end()
        await self.trying.end()


# -- what a request carries ----------------------------------------------------------------------
async def _body(request: Request, most: int) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise TooMuch(f"more than {most >> 20} MiB were sent")
        pieces.append(piece)
    return b"".join(pieces)


async def _question(request: Request) -> dict[str, Any]:
    given = parse_json(await _body(request, QUESTION) or b"{}", "the question", ConfigError,
                       finite=True)
    if not isinstance(given, dict):
        raise ConfigError("a question is a JSON object")
    return given


def _only(given: Any, kinds: dict[str, Any]) -> dict[str, Any]:
    """Entries that are known, each of its kind; null is none."""
    if not isinstance(given, dict):
        raise ConfigError("expected a JSON object")
    for key, value in given.items():
        if key not in kinds:
            raise ConfigError(f"{key!r} is not known here; there are {', '.join(kinds) or 'none'}")
        wanted = (int, float) if kinds[key] is float else kinds[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise ConfigError(f"{key}: expected {kinds[key].__name__}")
    return {k: v for k, v in given.items() if v is not None}


def _page(name: str) -> bytes:
    return files("burnish.ui").joinpath("page", name).read_bytes()


def _zipped(folder: Path) -> Any:
    made = tempfile.TemporaryFile(dir=folder.parent)     # where there is room for it
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                archive.write(path, path.name)
    made.seek(0)
    return made


def _pieces(file: Any) -> Iterator[bytes]:
    with file:
        while piece := file.read(1 << 20):
            yield piece


# -- the whole -----------------------------------------------------------------------------------
def _told(error: Exception) -> Response:
    status = 413 if isinstance(error, TooMuch) else 403 if isinstance(error, Refused) else \
        404 if isinstance(error, Missing) else 400
    said = " ".join(str(error).split())
    return JSONResponse({"error": said, "kind": type(error).__name__}, status_code=status)


def make(ui: Ui, host: str = "127.0.0.1", token: str | None = None) -> Guard:
    """The application, guarded."""
    async def told(request: Request, error: Exception) -> Response:
        return _told(error)

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        await ui.close()

    def route(path: str, method: str, call: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, call, methods=[method])

    app = Starlette(routes=[
        route("/", "GET", ui.index),
        route("/page/{name}", "GET", ui.asset),
        route("/api/here", "GET", ui.here),
        route("/api/browse", "GET", ui.browse),
        route("/api/ask/{what}", "POST", ui.ask),
        route("/api/uploads", "POST", ui.upload),
        route("/api/uploads/{id}/{path:path}", "PUT", ui.take),
        route("/api/uploads/{id}", "DELETE", ui.drop),
        route("/api/runs", "GET", ui.all),
        route("/api/runs", "POST", ui.start),
        route("/api/runs/{id}", "GET", ui.state),
        route("/api/runs/{id}/stop", "POST", ui.stop),
        route("/api/runs/{id}/resume", "POST", ui.resume),
        route("/api/runs/{id}/events", "GET", ui.events),
        route("/api/runs/{id}/report", "GET", ui.report),
        route("/api/runs/{id}/adapter.zip", "GET", ui.adapter),
        route("/api/runs/{id}/predict", "POST", ui.predict),
    ], exception_handlers={BurnishError: told, OSError: told}, lifespan=life)
    return Guard.around(app, host, token)
