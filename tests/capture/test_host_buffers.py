"""Rows on their way to the host: a few buffers, each used again only once it was written."""

from __future__ import annotations

import threading

import torch

from llama_3 import HookPoint
from saint.capture.shards import HostBuffers

HOOK = HookPoint(2, "resid_pre")


def wanted(n_rows: int, dtype: torch.dtype = torch.bfloat16) -> dict[HookPoint, dict]:
    return {HOOK: {"activations": torch.zeros(n_rows, 8, dtype=dtype)}}


def test_buffers_are_used_again_and_never_while_they_are_in_use():
    buffers = HostBuffers(2, pin=False)
    first, second = buffers.take(wanted(100)), buffers.take(wanted(100))
    places = {taken.rows[HOOK]["activations"].data_ptr() for taken in (first, second)}
    assert len(places) == 2
    got: list[int] = []
    waiting = threading.Thread(
        target=lambda: got.append(buffers.take(wanted(60)).rows[HOOK]["activations"].data_ptr())
    )
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive(), "both are in use"
    second.release()
    waiting.join(10)
    assert got == [second.rows[HOOK]["activations"].data_ptr()]


def test_a_buffer_fits_what_is_wanted():
    buffers = HostBuffers(1, pin=False)
    for n_rows in (10, 3, 200):
        taken = buffers.take(wanted(n_rows))
        tensor = taken.rows[HOOK]["activations"]
        assert tensor.shape == (n_rows, 8) and tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
        taken.release()
