"""A local stand-in for the Message Batches API, with faults, that counts what was billed.

Run as a program it prints its port and serves until it is stopped; `MockApi` runs it in a thread.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BASE_PATH = "/anthropic"


def explain_answer(params: dict[str, Any]) -> str:
    digest = hashlib.sha256(params["messages"][0]["content"].encode()).hexdigest()[:6]
    share = int(digest, 16) % 100 / 100
    return json.dumps(
        {"rationale": "words", "common_semantic": f"concept {digest}", "fits": [1, 2]}
        | {"certainty": share}
    )


@dataclass
class Batch:
    id: str
    requests: list[dict[str, Any]]
    created: datetime
    results: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    canceling: bool = False
    polls: int = 0


@dataclass
class MockApi:
    """The server's state and behaviour; every attribute may be changed while it runs."""

    answer: Callable[[dict[str, Any]], str] = explain_answer
    key: str = "sk-test-SECRET-1234567890"
    polls_until_ended: int = 1
    result_kinds: dict[str, str] = field(default_factory=dict)
    random_kinds: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    fault_rate: float = 0.0
    accept_delay_s: float = 0.0
    seed: int = 0
    batches: dict[str, Batch] = field(default_factory=dict)
    live_requests: list[dict[str, Any]] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    strangers_asked: list[str] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    patience_s: float = 0.0  # a client that is silent for less was killed
    archived: bool = False
    age: timedelta = timedelta(0)
    skew: timedelta = timedelta(0)  # of the server's clock
    outage_until: float = 0.0  # time.monotonic(): till then every request gets 503 or a closed door
    outage_s: float = 0.0  # how long an injected outage lasts
    long_outages: list[float] = field(default_factory=list)  # of the first ones, seconds
    models: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> its model object
    rejects: tuple[str, ...] = ()  # parameters that get a 400
    is_local: bool = False  # /v1/messages and nothing else, as a local server has it
    at_once: int = 0
    most_at_once: int = 0
    live_delay_s: float = 0.0

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.rng = random.Random(self.seed)
        self.stranger = self._serve(_Stranger)
        self.server = self._serve(_Handler)

    def _serve(self, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
        server = _Server(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.api = self  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}{BASE_PATH}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": self.key,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def close(self) -> None:
        for server in (self.server, self.stranger):
            server.shutdown()
            server.server_close()

    # What was paid for: requests that succeeded, by latent and task.
    def paid(self) -> Counter[str]:
        units: Counter[str] = Counter()
        with self.lock:
            for batch in self.batches.values():
                self.finish(batch)
                for row in batch.results:
                    if row["result"]["type"] == "succeeded":
                        units[re.sub(r"-\d+-[0-9a-f]{10}$", "", row["custom_id"])] += 1
        return units

    def finish(self, batch: Batch) -> None:
        if batch.results:
            return
        for request in batch.requests:
            batch.results.append(
                {"custom_id": request["custom_id"], "result": self._result(request, batch)}
            )
        self.rng.shuffle(batch.results)
        batch.ended = True

    def _result(self, request: dict[str, Any], batch: Batch) -> dict[str, Any]:
        kind = "canceled" if batch.canceling else "succeeded"
        for pattern, chosen in self.result_kinds.items():
            if re.search(pattern, request["custom_id"]):
                kind = chosen
        draw = self.rng.random()
        for chosen, share in self.random_kinds.items():
            if draw < share:
                kind = chosen
                break
            draw -= share
        if kind in ("errored", "invalid"):
            error = "api_error" if kind == "errored" else "invalid_request_error"
            return {
                "type": "errored",
                "error": {"type": "error", "error": {"type": error, "message": f"mock {error}"}},
            }
        if kind in ("canceled", "expired"):
            return {"type": kind}
        stop = kind if kind in ("refusal", "max_tokens") else "end_turn"
        text = "I can't help with that." if kind == "refusal" else self.answer(request["params"])
        return {"type": "succeeded", "message": self.message(request["params"], text, stop)}

    def message(self, params: dict[str, Any], text: str, stop: str = "end_turn") -> dict[str, Any]:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": params["model"],
            "content": [
                {"type": "thinking", "thinking": "{hm}", "signature": "x"},
                {"type": "text", "text": text},
            ],
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": self.tokens(params), "output_tokens": 60},
        }

    def tokens(self, params: dict[str, Any]) -> int:
        return (len(params["system"]) + len(params["messages"][0]["content"])) // 4

    def describe(self, batch: Batch) -> dict[str, Any]:
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        if batch.ended:
            counts |= Counter(row["result"]["type"] for row in batch.results)
        else:
            counts["processing"] = len(batch.requests)
        created = batch.created - self.age + self.skew
        stranger = f"http://localhost:{self.stranger.server_address[1]}"
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended"
            if batch.ended
            else ("canceling" if batch.canceling else "in_progress"),
            "request_counts": counts,
            "created_at": created.isoformat(),
            "expires_at": (created + timedelta(days=1)).isoformat(),
            "ended_at": created.isoformat() if batch.ended else None,
            "archived_at": created.isoformat() if self.archived else None,
            "cancel_initiated_at": None,
            # On another host: a client that follows it sends its key there.
            "results_url": f"{stranger}/v1/messages/batches/{batch.id}/results"
            if batch.ended
            else None,
        }

    def next_fault(self, where: str) -> str | None:
        """The next planned fault of this place ("create:529"), else a random one."""
        with self.lock:
            for fault in self.faults:
                if fault.startswith(where + ":"):
                    self.faults.remove(fault)
                    return self._count(where, fault.split(":")[1])
            if where in _FAULTS and self.rng.random() < self.fault_rate:
                return self._count(where, self.rng.choice(_FAULTS[where]))
        return None

    def wait_for(self, fault: str) -> None:
        """Wait until a fault has happened: the server may notice later that its client left."""
        deadline = time.monotonic() + 30
        while not self.injected[fault]:
            assert time.monotonic() < deadline, f"{fault} never happened"
            time.sleep(0.01)

    def _count(self, where: str, kind: str) -> str:
        if not kind.startswith("hang"):  # these are counted when the client has given up
            self.injected[f"{where}:{kind}"] += 1
        return kind


_FAULTS = {
    "create": "429 500 529 drop_before drop_after hang_before hang_after outage".split(),
    "read": ["429", "500", "529", "drop_before", "hang_before", "outage"],
    "results": ["cut", "broken", "twice", "missing", "500", "hang_before", "outage"],
}
FAULTS = frozenset(f"{where}:{kind}" for where, kinds in _FAULTS.items() for kind in kinds)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients are killed on purpose
            super().handle_error(request, client_address)


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.api.strangers_asked.append(self.path)  # type: ignore[attr-defined]
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One packet per answer: header and body apart would each wait for the other's acknowledgement.
    wbufsize = -1

    @property
    def api(self) -> MockApi:
        return self.server.api  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        now = time.time() if timestamp is None else timestamp
        return super().date_time_string(now + self.api.skew.total_seconds())

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, kind: str, message: str) -> None:
        headers = {"retry-after": "0"} if status in (429, 500, 503, 529) else {}
        self._json({"type": "error", "error": {"type": kind, "message": message}}, status, headers)

    def _begin(self) -> str | None:
        """Check key and path; returns the path below /v1, None when it was answered already."""
        self.api.log.append((self.command, self.path))
        if not self.path.startswith(BASE_PATH + "/v1/"):
            return self._error(404, "not_found_error", f"no {self.path}")
        given = self.headers.get("Authorization", "") + self.headers.get("x-api-key", "")
        if time.monotonic() < self.api.outage_until:
            if self.api.rng.random() < 0.5:
                return self._error(503, "api_error", "mock outage")
            self.close_connection = True
            return self.connection.close()
        if self.api.is_local and self.path.split("?")[0] != BASE_PATH + "/v1/messages":
            return self._error(404, "not_found_error", f"no {self.path}")
        if self.api.key not in given and not self.api.is_local:
            return self._error(401, "authentication_error", f"invalid key {given}")
        return self.path[len(BASE_PATH) + 3 :].split("?")[0]

    def _next_fault(self, where: str) -> str | None:
        self.where = where
        return self.api.next_fault(where)

    def _fail(self, fault: str | None) -> bool:
        if fault == "outage":
            lengths = self.api.long_outages
            length = lengths.pop() if lengths else self.api.outage_s
            self.api.outage_until = time.monotonic() + length
            self._error(503, "api_error", "mock outage")
        elif fault in ("drop_before", "hang_before"):
            self._break_off(fault)
        elif fault == "redirect":
            port = self.api.stranger.server_address[1]
            self._json({}, 307, {"Location": f"http://localhost:{port}{self.path}"})
        elif fault and fault.isdigit():
            self._error(int(fault), "mock_error", f"mock {fault}")
        else:
            return False
        return True

    def _break_off(self, fault: str) -> None:
        """Drop the connection; "hang": say nothing until the client drops it, and count that."""
        if fault.startswith("hang"):
            began = time.monotonic()
            assert not self.connection.recv(1), "the client goes on talking"
            if time.monotonic() - began >= self.api.patience_s:  # else it was killed
                self.api.injected[f"{self.where}:{fault}"] += 1
        self.close_connection = True
        self.connection.close()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(length)
        path = self._begin()
        if path is None or len(raw) < length:  # the client died in the middle of its request
            self.close_connection = True
            return
        body = json.loads(raw or b"{}")
        if path == "/messages/batches":
            self._create(body)
        elif path == "/messages/count_tokens":
            if not self._fail(self._next_fault("count")):
                self._json({"input_tokens": self.api.tokens(body)})
        elif path == "/messages":
            self._live(body)
        elif match := re.fullmatch(r"/messages/batches/([\w-]+)/cancel", path):
            batch = self.api.batches[match[1]]
            batch.canceling = True
            self._json(self.api.describe(batch))
        else:
            self._error(404, "not_found_error", path)

    def _live(self, body: dict[str, Any]) -> None:
        api, fault = self.api, self._next_fault("live")
        if self._fail(fault):
            return
        if wrong := [name for name in api.rejects if name in body]:
            return self._error(400, "invalid_request_error", f"{wrong[0]}: unknown parameter")
        with api.lock:
            api.live_requests.append(body)
            api.at_once += 1
            api.most_at_once = max(api.most_at_once, api.at_once)
        time.sleep(api.live_delay_s)
        with api.lock:
            api.at_once -= 1
        if fault == "hang_after":
            self._break_off(fault)
        else:
            self._json(api.message(body, api.answer(body)))

    def _create(self, body: dict[str, Any]) -> None:
        api = self.api
        fault = self._next_fault("create")
        if self._fail(fault):
            return
        ids = [request["custom_id"] for request in body["requests"]]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
        time.sleep(api.accept_delay_s)
        with api.lock:
            batch = Batch(f"msgbatch_{len(api.batches):04d}", body["requests"], datetime.now(UTC))
            api.batches[batch.id] = batch
        time.sleep(api.accept_delay_s)
        if fault in ("drop_after", "hang_after"):
            self._break_off(fault)
        else:
            self._json(api.describe(batch))

    def do_GET(self) -> None:
        path = self._begin()
        if path is None:
            return
        api = self.api
        if model := re.fullmatch(r"/models/([\w.-]+)", path):
            found = api.models.get(model[1])
            if found is None:
                return self._error(404, "not_found_error", f"no model {model[1]}")
            return self._json(found)
        match = re.fullmatch(r"/messages/batches/([\w-]+)(/results)?", path)
        if match and match[2]:
            self._results(api.batches[match[1]])
        elif self._fail(self._next_fault("read")):
            return
        elif match and match[1] in api.batches:
            batch = api.batches[match[1]]
            with api.lock:
                batch.polls += 1
                if batch.polls >= api.polls_until_ended or batch.canceling:
                    api.finish(batch)
            self._json(api.describe(batch))
        elif path == "/messages/batches":
            self._list()
        else:
            self._error(404, "not_found_error", f"no batch at {path}")

    def _list(self) -> None:
        with self.api.lock:
            batches = list(self.api.batches.values())[::-1]
        for batch in batches:
            batch.polls += 1
            if batch.polls >= self.api.polls_until_ended:
                with self.api.lock:
                    self.api.finish(batch)
        after = re.search(r"after_id=([\w-]+)", self.path)
        ids = [b.id for b in batches]
        start = ids.index(after[1]) + 1 if after else 0
        page = [self.api.describe(b) for b in batches[start : start + 5]]
        self._json(
            {
                "data": page,
                "has_more": start + 5 < len(batches),
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    def _results(self, batch: Batch) -> None:
        fault = self._next_fault("results")
        if self._fail(fault) or not batch.ended:
            return
        lines = [json.dumps(row).encode() + b"\n" for row in batch.results]
        if fault == "broken":
            place = self.api.rng.randrange(len(lines))
            lines[place] = lines[place][: len(lines[place]) // 2] + b"\n"
        if fault == "twice":
            lines.insert(0, lines[-1])
        if fault == "missing":
            del lines[self.api.rng.randrange(len(lines))]
        body = b"".join(lines)
        self.send_response(200)
        self.send_header("Content-Type", "application/binary")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: self.api.rng.randrange(len(body))])
            self.wfile.flush()
            self._break_off(fault)
        else:
            self.wfile.write(body)


def model_object(name: str, *, thinking: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    """What /v1/models/NAME answers; thinking: the types that the model takes."""
    yes, no = {"supported": True}, {"supported": False}
    names = ("disabled", "between_tools", "adaptive", "enabled")
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": "2026-06-01T00:00:00Z",
        "lifecycle": "active",
        "max_tokens": 64000,
        "capabilities": {
            "batch": yes,
            "structured_outputs": yes,
            "effort": {"supported": True, "low": yes, "medium": yes, "high": yes},
            "thinking": {
                "supported": True,
                "types": {name: yes if name in thinking else no for name in names},
            },
        },
    } | fields
