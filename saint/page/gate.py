"""A login in front of everything the page's server answers, where others can reach it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from saint.stage.html import render

WRONG_ATTEMPTS, PER_SECONDS = 10, 60.0
SESSION_SECONDS = 24 * 3600
_MAX_SESSIONS, _MAX_FORM_BYTES = 1000, 4096
# Gradio asks its own server for this when it starts; the answer is true or false.
STARTED = "/gradio_api/startup-events"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """ASGI middleware that lets nothing but a login page out to visitors without a session.

    Comparisons take the same time whatever was typed. Ten wrong attempts within a minute, from
    whomever, close the login until the first of them is a minute old: an address says nothing
    where all come through one tunnel. Sessions that are open go on. They are kept in memory, as
    digests, for a day.
    """

    def __init__(
        self, app: ASGIApp, user: str, password: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app, self._clock = app, clock
        self._wanted = _digest(user), _digest(password)
        self._wrong: deque[float] = deque()
        self._sessions: dict[bytes, float] = {}  # digest of the cookie -> when it ends
        # Cookies do not tell ports apart: another demo on this host has its own.
        self._cookie = f"saint-session-{secrets.token_hex(4)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] == "lifespan" or scope.get("path") == STARTED:
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            request = Request(scope, receive)
            if request.url.path == "/login" and request.method == "POST":
                await (await self._login(request))(scope, receive, send)
            elif self._knows(request.cookies.get(self._cookie, "")):
                await self._app(scope, receive, send)
            else:
                await self._refuse(request)(scope, receive, send)

    def _knows(self, cookie: str) -> bool:
        return self._sessions.get(_digest(cookie), 0.0) > self._clock()

    def _refuse(self, request: Request) -> Response:
        if request.url.path in ("/", "/login"):
            return _page(request, 401)
        return PlainTextResponse("log in first", 401, _HEADERS)

    async def _login(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_FORM_BYTES:
                return PlainTextResponse("the form is too long", 413, _HEADERS)
        # Nothing is awaited from here on: attempts at once are counted one after the other.
        now = self._clock()
        while self._wrong and self._wrong[0] <= now - PER_SECONDS:
            self._wrong.popleft()
        if len(self._wrong) >= WRONG_ATTEMPTS:
            said = "Too many wrong attempts: wait a minute."
            return _page(request, 429, said, {"Retry-After": str(int(PER_SECONDS))})
        fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
        given = (_digest(fields.get(name, [""])[0]) for name in ("username", "password"))
        equal = [hmac.compare_digest(a, b) for a, b in zip(given, self._wanted, strict=True)]
        if not all(equal):
            self._wrong.append(now)
            return _page(request, 401, "Wrong user or password.")
        return self._open(request, now)

    def _open(self, request: Request, now: float) -> Response:
        self._sessions = {key: end for key, end in self._sessions.items() if end > now}
        while len(self._sessions) >= _MAX_SESSIONS:
            self._sessions.pop(next(iter(self._sessions)))
        cookie = secrets.token_urlsafe(32)
        self._sessions[_digest(cookie)] = now + SESSION_SECONDS
        response = _page(request, 200)
        proto = request.headers.get("x-forwarded-proto", request.url.scheme)
        response.set_cookie(
            self._cookie,
            cookie,
            max_age=SESSION_SECONDS,
            secure=proto.split(",")[0].strip() == "https",
            httponly=True,
            samesite="lax",
        )
        return response


def _page(
    request: Request, status: int, said: str = "", headers: dict[str, str] | None = None
) -> Response:
    """The form, or, with status 200, a page that goes on to where the visitor wanted to."""
    html = render(
        Path(__file__).parent / "templates",
        "login.html",
        query=request.url.query,
        said=said,
        inside=status == 200,
    )
    return HTMLResponse(html, status, _HEADERS | (headers or {}))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
