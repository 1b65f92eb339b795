"""Many clients at once, some of whom hang up: everyone gets the answer they would get alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.demo_load import Full, Server, client_request, load
from tests.support.steering_site import Site, running_site
from tests.support.tiny_steering import N_LATENTS, one_thread


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with one_thread(), running_site(tmp_path_factory.mktemp("load")) as running:
        yield running


def test_every_client_gets_its_own_answer_in_turn(site: Site) -> None:
    server = Server(site.url, lambda: 1.0)
    seen = load(server, [client_request(i, N_LATENTS, 4) for i in range(10)], seconds=3)
    assert seen["answers"] > 10 and seen["dropped"] > 0
    assert seen["wrong"] == seen["refused"] == 0
    # One request runs at a time, and the rest keep their order.
    assert seen["overtaken"] <= 1 and seen["most"] - seen["least"] <= 2
    site.wait_until_idle()


def test_who_hangs_up_frees_the_place_and_a_full_queue_says_so(site: Site) -> None:
    server, request = Server(site.url, lambda: 1.0), client_request(0, N_LATENTS, 4)
    alone = server.ask(request)
    site.brake.seconds = 0.3  # each answer takes a second: the places below are all waited for
    try:
        with pytest.raises(Full):
            places = [server.join(request) for _ in range(100)]
            pytest.fail(f"{len(places)} got in")
        site.brake.seconds = 0.0
        assert server.follow(server_place(server, request), patience=0.01) is None
    finally:
        site.brake.seconds = 0.0
    assert server.ask(request) == alone


def server_place(server: Server, request: dict) -> str:
    """Join as soon as there is room."""
    while True:
        try:
            return server.join(request)
        except Full:
            continue
