"""Nothing of the demo answers without a login: every route of the running app is tried."""

from __future__ import annotations

import http.client
import json
import re
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from saint.page.gate import STARTED, WRONG_ATTEMPTS, Gate
from tests.support.steering_site import Site, running_browser, running_site
from tests.support.tiny_steering import LABELS, one_thread

USER, PASSWORD = "ann", "pass:wörd"
# All that a visitor gets without a login: the form, and whether the server has started.
HARMLESS = {STARTED: b"false"}
FORM = ("/", "/login")
SECRETS = [*LABELS.values(), "sae0", "/steer", "gradio", "diplomats"]


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("gate")
    page = root / "latents.html"
    page.write_text(f"<p>{SECRETS[0]}</p>")
    with running_site(root, auth=(USER, PASSWORD), latent_page=page) as running:
        yield running


@pytest.fixture(autouse=True)
def open_gate(site: Site) -> Gate:
    """The running server's gate, with no wrong attempt counted."""
    layer = site.app.middleware_stack
    while not isinstance(layer, Gate):
        layer = layer.app
    layer._wrong.clear()
    return layer


def ask(
    site: Site, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes, Any]:
    """One request, its path as it stands."""
    where = urllib.parse.urlsplit(site.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def log_in(site: Site, user: str, password: str, **headers: str) -> tuple[int, bytes, Any]:
    form = urllib.parse.urlencode({"username": user, "password": password}).encode()
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    return ask(site, "POST", "/login", form, **kind, **headers)


def routes(app: Any, before: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every path of an app and of what is mounted in it, parameters filled in."""
    for route in app.routes:
        path = before + (getattr(route, "path", None) or "")
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if hasattr(inner, "routes"):
            yield from routes(inner, path)
        else:
            filled = re.sub(r"\{[^}]*\}", "x", path)
            yield filled, set(getattr(route, "methods", None) or {"GET"})


TOLD = [
    "/config", "/config?deep_link=x", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd",
    "/gradio_api/queue/join", "/gradio_api/queue/data?session_hash=x", "/gradio_api/token",
    "/gradio_api/app_id", "/gradio_api/upload", "/gradio_api/stream/x", "/theme.css",
    "/gradio_api/info", "/gradio_api/call/steer", "/assets/index.js", "/static/img/logo.svg",
    "/openapi.json", "/docs", "/redoc", "/mcp", "/gradio_api/mcp/sse", "/queue/join", "/info",
    "//", "/./config", "/login/../config", "/gradio_api/startup-events/../info", "/%63onfig",
    "/gradio_api/startup-events/", "/login/", "/?all_endpoints=1", "/favicon.ico", "/robots.txt",
]  # fmt: skip


def test_no_route_answers_without_a_login(site: Site):
    found = dict(routes(site.app))
    assert len(found) > 60 and {"/gradio_api/queue/join", "/config", "/latents-1"} <= found.keys()
    data = json.dumps({"data": [], "session_hash": "x", "fn_index": 0, "event_id": "x"}).encode()
    for path in [*found, *TOLD]:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
            status, body, headers = ask(
                site, method, path, data, **{"Content-Type": "application/json"}
            )
            if path in HARMLESS:
                assert body in (HARMLESS[path], b"") or status == 405, path
                continue
            assert status == 401, (method, path, status)
            assert "set-cookie" not in headers
            if path.split("?")[0] in FORM:
                assert method == "HEAD" or b"<form" in body
            else:
                assert method == "HEAD" or body == b"log in first", (method, path)
            assert not any(secret.encode() in body for secret in SECRETS), (method, path)


def test_a_login_opens_everything_with_a_cookie_that_scripts_and_other_sites_lack(site: Site):
    status, body, headers = log_in(site, USER, PASSWORD)
    assert status == 200 and b"logged in" in body
    (cookie,) = headers.get_all("set-cookie")
    name = cookie.split(";")[0]
    parts = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=lax", "path=/"} <= parts and "secure" not in parts
    assert ask(site, "GET", "/config", Cookie=name)[0] == 200
    for damaged in (name[:-1], name.split("=")[0] + "=", "x=" + name.split("=")[1]):
        assert ask(site, "GET", "/config", Cookie=damaged)[0] == 401
    forwarded = log_in(site, USER, PASSWORD, **{"X-Forwarded-Proto": "https"})[2]
    assert "secure" in forwarded["set-cookie"].lower()


def test_a_client_logs_in_and_steers(site: Site):
    from gradio_client import Client

    client = Client(site.url, auth=(USER, PASSWORD), verbose=False, analytics_enabled=False)
    request = {"prompts": ["the court"], "steer": ["0:3=add:1.5"], "max_new_tokens": 4}
    assert client.predict(request, api_name="/steer")["pairs"]
    with pytest.raises(Exception, match="Invalid credentials"):
        Client(site.url, auth=(USER, "wrong"), verbose=False, analytics_enabled=False)


def test_ten_wrong_attempts_close_the_login_for_a_minute(site: Site, open_gate: Gate, monkeypatch):
    cookie = log_in(site, USER, PASSWORD)[2]["set-cookie"].split(";")[0]
    wrong = [("", ""), (USER, ""), ("eve", PASSWORD), (USER, PASSWORD + "x"), (USER, "é" * 500)]
    assert {log_in(site, *pair)[0] for pair in wrong} == {401}
    with ThreadPoolExecutor(8) as pool:  # at once: none slips in between
        codes = list(pool.map(lambda _: log_in(site, USER, "guess")[0], range(20)))
    assert codes.count(401) == WRONG_ATTEMPTS - len(wrong) and codes.count(429) == 15
    status, _, headers = log_in(site, USER, PASSWORD)
    assert status == 429 and headers["retry-after"] == "60" and "set-cookie" not in headers
    assert ask(site, "GET", "/config", Cookie=cookie)[0] == 200, "who is in stays in"
    now = open_gate._clock()
    monkeypatch.setattr(open_gate, "_clock", lambda: now + 61)
    assert log_in(site, USER, PASSWORD)[0] == 200
    monkeypatch.setattr(open_gate, "_clock", lambda: now + 25 * 3600)
    assert ask(site, "GET", "/config", Cookie=cookie)[0] == 401, "a session lasts a day"


def test_every_attempt_is_compared_whole_and_in_constant_time(site: Site, monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a)) or real(a, b))
    for pair in [("x", "y"), (USER, "y"), ("", "é" * 100)]:
        assert log_in(site, *pair)[0] == 401
    assert compared == [32] * 6  # digests of both, whatever was typed


def test_a_form_that_is_too_long_is_refused(site: Site):
    assert log_in(site, USER, "x" * 5000)[0] == 413


def test_a_person_logs_in_and_a_link_brings_its_query(site: Site):
    with running_browser() as browser:
        tab = browser.new_page()
        problems: list[str] = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(f'{site.url}/?prompt=the court "><script>alert(1)</script>')
        tab.fill("[name=username]", USER)
        tab.fill("[name=password]", "no")
        tab.click("button")
        assert "Wrong user or password" in tab.inner_text("[role=alert]")
        tab.fill("[name=username]", USER)
        tab.fill("[name=password]", PASSWORD)
        tab.click("button")
        tab.wait_for_selector("#header h1")
        assert "prompt=the%20court" in tab.url and problems == []
        assert tab.evaluate("document.cookie").count("saint-session") == 0
        tab.close()
