"""Fifty clients at once at the demo: whether each gets its own answer, and how long it waits.

    python -m benchmarks.demo_load --llama_model_dir Q/model --sae_model_path Q/trained_sae.pt

Starts the demo as its own command does and asks it over HTTP. First every request alone, one after
the other; then all clients for --seconds, each its own request again and again. One client in five
hangs up while it waits or is being answered. At the end all hang up at once, and one more request
shows that their places are free. An answer is wrong when it differs in any token, activation or
surprise from the one the client got alone. `overtaken`: the largest number of later requests that
were answered before an earlier one. `megabytes`: the server's resident set after each tenth.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import served_demo
from saint.stage.flags import positive_int
from saint.stage.program import run_stage
from saint.steering.studio import EXAMPLE_PROMPTS

_CALL = "/gradio_api/call/steer"
_RUDE = 5  # one in so many clients hangs up
_PATIENCE = 600.0  # seconds


class Full(Exception):
    """The queue took nobody in."""


@dataclass(frozen=True)
class Server:
    """A running demo and what its process holds in memory."""

    url: str
    megabytes: Callable[[], float]

    def join(self, request: dict[str, Any]) -> str:
        """Get into the queue; returns the place's name. Raises Full."""
        connection = self.connection()
        try:
            body = json.dumps({"data": [request]})
            connection.request("POST", _CALL, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
            if answer.status == 503:
                raise Full
            assert answer.status == 200, (answer.status, said)
            return json.loads(said)["event_id"]
        finally:
            connection.close()

    def follow(self, event_id: str, patience: float = _PATIENCE) -> list[Any] | None:
        """Wait for the answer; hang up after so many seconds, and return None."""
        connection, ends = self.connection(), time.monotonic() + patience
        connection.timeout = patience
        try:
            connection.request("GET", f"{_CALL}/{event_id}")
            answer, event = connection.getresponse(), ""
            while line := answer.readline().decode():
                if time.monotonic() > ends:
                    return None
                name, _, value = line.rstrip("\n").partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    assert event != "error", value
                    if event == "complete":
                        return json.loads(value)
            raise AssertionError("the server ended the answer")
        except TimeoutError:
            return None
        finally:
            connection.close()

    def ask(self, request: dict[str, Any]) -> list[Any]:
        """Wait for one answer."""
        found = self.follow(self.join(request))
        assert found is not None
        return found

    def connection(self) -> http.client.HTTPConnection:
        """A new connection, not opened yet."""
        where = urllib.parse.urlsplit(self.url)
        return http.client.HTTPConnection(where.hostname or "", where.port, timeout=_PATIENCE)


@dataclass
class Tally:
    """What all clients saw; by one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    joined: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    by_client: dict[int, int] = field(default_factory=dict)
    wrong: int = 0
    refused: int = 0
    dropped: int = 0

    def overtaken(self) -> int:
        """The most later requests that were answered before an earlier one."""
        place = {event: i for i, event in enumerate(self.joined)}
        order = [place[event] for event in self.answered]
        return max((sum(p > q for p in order[:i]) for i, q in enumerate(order)), default=0)


def client_request(number: int, n_latents: int, new_tokens: int) -> dict[str, Any]:
    """Return the request of one client: no two have the same seed and latent."""
    return {
        "prompts": [EXAMPLE_PROMPTS[number % len(EXAMPLE_PROMPTS)]],
        "steer": [f"0:{number * 7 % n_latents}=add:{1 + number % 3}"],
        "max_new_tokens": new_tokens,
        "temperature": 0.7,
        "seed": number,
    }


def load(server: Server, requests: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Ask each request alone, then all at once for a while. Returns what was seen."""
    server.ask(requests[0])
    began = time.monotonic()
    alone = [server.ask(request) for request in requests]
    alone_s = (time.monotonic() - began) / len(requests)
    tally, start = Tally(), time.monotonic()
    end = start + seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        rude = number % _RUDE == _RUDE - 1
        while time.monotonic() < end:
            try:
                with tally.lock:  # so that the order of joining is known
                    began, event = time.monotonic(), server.join(requests[number])
                    tally.joined.append(event)
            except Full:
                with tally.lock:
                    tally.refused += 1
                time.sleep(draw.uniform(0.1, 0.5))
                continue
            whole = alone_s * len(requests)  # what a wait in a full queue takes
            found = server.follow(event, draw.uniform(0.01, whole) if rude else _PATIENCE)
            with tally.lock:
                if found is None:
                    tally.dropped += 1
                    continue
                tally.answered.append(event)
                tally.waits.append(time.monotonic() - began)
                tally.by_client[number] = tally.by_client.get(number, 0) + 1
                tally.wrong += found != alone[number]

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    megabytes = []
    for _ in range(10):
        time.sleep(seconds / 10)
        megabytes.append(round(server.megabytes()))
    for thread in threads:
        thread.join()
    took = time.monotonic() - start
    polite = [tally.by_client.get(i, 0) for i in range(len(requests)) if i % _RUDE != _RUDE - 1]
    return {
        "clients": len(requests),
        "seconds": round(took, 1),
        "answers": len(tally.answered),
        "wrong": tally.wrong,
        "refused": tally.refused,
        "dropped": tally.dropped,
        "least": min(polite),
        "most": max(polite),
        "overtaken": tally.overtaken(),
        "wait_s": round(statistics.median(tally.waits), 2),
        "wait_worst_s": round(max(tally.waits), 2),
        "alone_s": round(alone_s, 2),
        "after_all_left_s": round(_after_all_left(server, requests), 2),
        "megabytes": megabytes,
    }


def hang_up_together(server: Server, requests: Sequence[dict[str, Any]]) -> int:
    """Join and listen until the queue is full or all have, then leave; returns how many joined."""
    listening = []
    for request in requests:
        try:
            event = server.join(request)
        except Full:
            break
        connection = server.connection()
        connection.request("GET", f"{_CALL}/{event}")
        listening.append(connection)
    for connection in listening:
        connection.close()
    return len(listening)


def answer_as_soon_as_there_is_room(server: Server, request: dict[str, Any]) -> list[Any]:
    """Ask until the queue takes it."""
    while True:
        try:
            return server.ask(request)
        except Full:
            time.sleep(0.05)


def _after_all_left(server: Server, requests: Sequence[dict[str, Any]]) -> float:
    """Fill the queue, hang up everywhere, and time one more request."""
    hang_up_together(server, requests)
    began = time.monotonic()
    answer_as_soon_as_there_is_room(server, requests[0])
    return time.monotonic() - began


def resident_megabytes(pid: int) -> float:
    """Return what a process holds in memory, by /proc."""
    text = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1000


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama_model_dir", type=Path, required=True)
    parser.add_argument("--sae_model_path", type=Path, required=True)
    parser.add_argument("--clients", type=positive_int, default=50, help="[%(default)s]")
    parser.add_argument("--seconds", type=positive_int, default=120, help="[%(default)s]")
    parser.add_argument("--max_new_tokens", type=positive_int, default=8, help="[%(default)s]")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with served_demo(args.llama_model_dir, args.sae_model_path) as (url, process):
        server = Server(url, lambda: resident_megabytes(process.pid))
        requests = [client_request(i, 1000, args.max_new_tokens) for i in range(args.clients)]
        print(json.dumps(load(server, requests, args.seconds)))


if __name__ == "__main__":
    run_stage(main)
