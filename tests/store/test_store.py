"""The store on disk: number formats, what is held out, files that are not as they should be."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from saint.store import __main__
from saint.store.activation_store import open_store, shard_name
from saint.store.dataset import held_out_mask, is_held_out
from saint.store.row_format import decode_rows, encode_rows


def test_int8_has_one_scale_per_token_and_float16_stays_finite():
    x = torch.randn(5, 8) * torch.tensor([1e-8, 1.0, 0.0, 3e4, 1e38])[:, None]
    stored = encode_rows(x, "int8")
    assert stored["activations"].dtype == torch.int8 and stored["scales"].shape == (5,)
    step = x.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((decode_rows(stored) - x).abs() <= step / 2 * 1.001).all())
    assert bool(decode_rows(encode_rows(x, "float16")).isfinite().all())


def test_the_held_out_mask_is_the_rule_for_single_sentences():
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 6, 500)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, 9, offsets[-1]).astype(np.int32)
    mask = held_out_mask(tokens, offsets[100:], fraction=0.3)
    ends = zip(offsets[100:-1], offsets[101:], strict=True)
    assert mask.tolist() == [is_held_out(tokens[a:b], fraction=0.3) for a, b in ends]
    assert 0 < mask.sum() < len(mask)


def test_the_store_names_every_damaged_missing_and_foreign_file(root, tmp_path, capsys):
    out = tmp_path / "acts"
    shutil.copytree(root / "acts", out)
    __main__.main([str(out), "--n_sentences", "2"])
    shown = capsys.readouterr().out
    assert "200 sentences" in shown and "every file has its checksum" in shown
    shard = open_store(out).read_shard(0)
    norm = float(torch.linalg.vector_norm(shard.read(slice(0, 1)).float()))
    assert f"sentence {int(shard.sentence_ids[0])}: " in shown and f"[{norm:.0f}]" in shown
    flipped, short, missing = (out / "layer_2" / shard_name(i) for i in range(3))
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 16]))
    short.write_bytes(short.read_bytes()[:-1])
    missing.unlink()
    foreign = out / "layer_2" / shard_name(77)
    shutil.copyfile(root / "acts" / "layer_2" / shard_name(0), foreign)
    other = out / "layer_5" / shard_name(0)
    other.parent.mkdir()
    other.write_bytes(b"?")
    torn = out / "layer_2" / f".{shard_name(2)}.123.tmp"
    torn.write_bytes(b"?")
    with pytest.raises(SystemExit, match="1"):
        __main__.main([str(out)])
    errors = capsys.readouterr().err.splitlines()
    found = {str(path): [line for line in errors if str(path) in line] for path in
             (flipped, short, missing, foreign, other, torn)}  # fmt: skip
    words = ("corrupt", "bytes", "missing", "foreign", "foreign", "an interrupted run")
    for (path, lines), word in zip(found.items(), words, strict=True):
        assert len(lines) == 1 and word in lines[0], path
    assert len(errors) == 6
