"""Without a GPU: what is to run on one mixes no devices, and holds no more memory than it did."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.dry_run import PARTS, dry
from benchmarks.memory import CUDA_CONTEXT
from tests.support.program import REPO

PEAKS = json.loads((REPO / "benchmarks/data/peak_bytes.json").read_text())
CUDA = torch.device("cuda", 0)
MOST = {"step, torch": 8e9, "step, triton": 8e9, "demo": 10e9 - CUDA_CONTEXT}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_holds_what_the_table_says(name):
    peak = PARTS[name]().peak
    assert peak == pytest.approx(PEAKS[name], rel=0.03), (
        "benchmarks/dry_run.py says how to renew it"
    )
    for beginning, most in MOST.items():
        assert not name.startswith(beginning) or peak <= most


def test_the_docs_have_the_table():
    text = (REPO / "docs" / "gpu.md").read_text()
    for name, n_bytes in PEAKS.items():
        assert f"| {name} | {n_bytes / 1e9:.2f} GB |" in text


def test_devices_that_are_mixed_fail():
    with dry(CUDA):
        there, here = torch.empty(3, 3, device=CUDA), torch.ones(3, 3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.mm(there, here)
        assert int(here.sum()) == 9, "what is on the CPU has numbers"


def test_memory_is_counted_from_a_storage_s_making_to_its_end():
    with dry(CUDA) as ledger:
        kept = torch.empty(1000, dtype=torch.bfloat16, device=CUDA)
        del_me = kept.float()
        view = del_me[::2]
        assert ledger.alive == 6000
        del del_me
        assert ledger.alive == 6000, "a view holds its storage"
        del view
        assert (ledger.alive, ledger.peak) == (2000, 6000)
        assert len(kept[kept > 0]) == 1000 and ledger.asked["aten.index"] == 1


def test_indexing_is_python_s():
    plain = torch.arange(120).view(4, 5, 6)
    rows = torch.tensor([1, 0])
    indices = [1, (1, 2), slice(1, 3), (..., 0), (None, 1), (slice(None), None, slice(2)), rows]
    indices += [
        (slice(None), rows),
        (0, slice(None), rows),
        (rows[:, None], rows),
        (slice(-2, None),),
    ]
    for index in indices:
        with dry(CUDA):
            mine = torch.empty(4, 5, 6, device=CUDA)[index].shape
        assert mine == plain[index].shape, index
