"""Who may ask. Before any route sees a request:

- its Host is this server's: a page elsewhere whose name was pointed at this machine (DNS rebinding)
  sends its own. On this machine the names of the loopback; where the server was opened wider,
  addresses by number (a name can be pointed, a number cannot) and the name it was opened under;
- what it sends comes from this page: Origin and Sec-Fetch-Site, where a browser tells them, are
  this server's, and what changes something has the header that a form elsewhere cannot send;
- off the loopback it has the token, as a cookie or a header.

Answers carry a policy under which the page runs its own script and nothing else.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

COOKIE, HEADER = "burnish_token", b"x-burnish"
#: what the page may load and run, and that nobody may frame it
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
           (b"cache-control", b"no-store"), (b"cross-origin-opener-policy", b"same-origin"),
           (b"cross-origin-resource-policy", b"same-origin"), (b"x-frame-options", b"DENY")]


def loopback(host: str) -> bool:
    """Is this a name or an address of this machine alone?

    >>> loopback("localhost"), loopback("127.0.0.1"), loopback("::1"), loopback("0.0.0.0")
    (True, True, True, False)
    """
    number = _number(host)
    return host == "localhost" or number is not None and number.is_loopback


def _number(host: str) -> Any:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@dataclass
class Guard:
    """Around `app`. host: what the server is bound to. token: None on the loopback."""

    app: App
    host: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def around(cls, app: App, host: str, token: str | None = None) -> Guard:
        """With a random token where the host is more than this machine."""
        if token is None and not loopback(host):
            token = secrets.token_urlsafe(32)
        return cls(app, host, token)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {k: v.decode("latin-1") for k, v in scope["headers"]}
        names = [k for k, _ in scope["headers"]]
        if names.count(b"host") != 1 or not self._host(headers[b"host"]):
            await _say(send, 421, "this server does not answer under that name")
        elif not self._ours(scope, headers):
            await _say(send, 403, "requests from other pages are refused")
        elif (given := self._invited(scope)) is not None:
            await self._let_in(scope, send, given)
        elif self.token is not None and not self._known(scope, headers):
            await _say(send, 401, "this needs the token that the server printed when it started: "
                                  "open the address with ?token=")
        else:
            await self.app(scope, receive, _with_headers(send))

    def _host(self, given: str) -> bool:
        name = (urlsplit(f"//{given}").hostname or "") if _plain(given) else ""
        if loopback(self.host):
            return loopback(name)
        known = name in ("localhost", self.host.lower())
        return bool(name) and (known or _number(name) is not None)

    def _ours(self, scope: Scope, headers: dict[bytes, str]) -> bool:
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin is not None and origin.partition("://")[2] != headers[b"host"]:
            return False
        reads = scope["method"] in ("GET", "HEAD")
        if reads and scope["path"] == "/":              # a link to the page may stand anywhere
            return True
        if site is not None and site not in ("same-origin", "none"):
            return False
        return reads or HEADER in headers

    def _invited(self, scope: Scope) -> str | None:
        """The token of an address as the server printed it."""
        if self.token is None or scope["path"] != "/" or scope["method"] != "GET":
            return None
        return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("token", [])), None)

    async def _let_in(self, scope: Scope, send: Any, given: str) -> None:
        if self.token is None or not _same(given, self.token):
            await _say(send, 401, "that is not the token that this server printed")
            return
        cookie = f"{_cookie(scope)}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        await send({"type": "http.response.start", "status": 303, "headers": [
            (b"location", b"/"), (b"set-cookie", cookie.encode()), *HEADERS]})
        await send({"type": "http.response.body", "body": b""})

    def _known(self, scope: Scope, headers: dict[bytes, str]) -> bool:
        assert self.token is not None
        bearer = headers.get(b"authorization", "")
        if bearer.lower().startswith("bearer ") and _same(bearer[7:].strip(), self.token):
            return True
        for part in headers.get(b"cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == _cookie(scope) and _same(value, self.token):
                return True
        return False


def _cookie(scope: Scope) -> str:
    """Browsers share cookies between the ports of a machine."""
    return f"{COOKIE}_{(scope.get('server') or ('', 0))[1]}"


def _plain(host: str) -> bool:
    """A host and perhaps a port, without what an address may have before and after them."""
    return bool(host) and not set(host) & set("/@?#\\ \t")


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())


def _with_headers(send: Any) -> Any:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {k for k, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(h for h in HEADERS if h[0] not in own)]
            if b"content-security-policy" not in own:
                message["headers"].append((b"content-security-policy", POLICY.encode()))
        await send(message)

    return sending


async def _say(send: Any, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", b"text/plain; charset=utf-8"), *HEADERS]})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
