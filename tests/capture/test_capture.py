"""Capture: number formats, ranks, batch sizes, datasets by URI, a model of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from llama_3 import HookPoint, load_llama
from saint.capture import record
from saint.stage.errors import UserError
from saint.stage.manifests import read_manifest
from saint.store.activation_store import open_store, shard_name
from saint.store.row_format import StoredRows
from tests.support.pipeline import (
    capture,
    capture_args,
    tree_bytes,
)
from tests.support.program import call_ranks


@pytest.mark.parametrize("store_dtype", ["bfloat16", "float16", "int8"])
def test_every_number_format_is_close_to_the_model(root: Path, tmp_path: Path, store_dtype: str):
    capture(root, tmp_path / "acts", num_samples=60, store_dtype=store_dtype)
    store = open_store(tmp_path / "acts")
    model, tokenizer = load_llama(
        root / "model", device=torch.device("cpu"), dtype=torch.float32, n_layers=3
    )
    shard, hook = store.read_shard(0), HookPoint(2, "resid_pre")
    for i in range(0, 60, 7):
        rows = slice(int(shard.offsets[i]), int(shard.offsets[i + 1]))
        tokens = [tokenizer.bos_id, *shard.token_ids[rows].tolist()]
        exact = model.capture(torch.tensor([tokens]), [hook])[hook][0, 1:]
        step = exact.abs().amax(dim=1, keepdim=True) / 254
        allowed = {"bfloat16": exact.abs() / 256, "float16": exact.abs() / 2048, "int8": step}
        error = (shard.read(rows).float() - exact).abs()
        assert bool((error <= allowed[store_dtype] * 1.01 + 1e-4).all())
    per_row = {"bfloat16": 64, "float16": 64, "int8": 36}[store_dtype]
    stored = StoredRows(store.shard_path(0)).empty(1)
    assert sum(tensor.nbytes for tensor in stored.values()) == per_row


def test_the_store_holds_the_hidden_states_of_transformers(root: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=400, max_position_embeddings=256, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.model", "tokenizer_spec.json"):
        shutil.copyfile(root / "model" / name, tmp_path / "model" / name)
    flags = {"model_dir": tmp_path / "model", "num_samples": 40, "dtype": "float32"}
    capture(root, tmp_path / "acts", **flags)
    shard = open_store(tmp_path / "acts").read_shard(0)
    offsets = shard.offsets.tolist()
    for a, b in zip(offsets, offsets[1:], strict=False):
        tokens = torch.tensor([[0, *shard.token_ids[a:b].tolist()]])
        with torch.no_grad():
            hidden = theirs(tokens, output_hidden_states=True).hidden_states[2][0, 1:]
        torch.testing.assert_close(shard.read(slice(a, b)).float(), hidden, rtol=8e-3, atol=1e-3)


def test_three_ranks_write_the_bytes_of_one(root: Path, tmp_path: Path):
    arguments = capture_args(root, tmp_path / "acts", device="cpu")
    ranks = call_ranks(3, "capture_activations", *arguments)
    assert [rank.returncode for rank in ranks] == [0, 0, 0], ranks[0].stderr
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")


def test_an_automatic_batch_size_is_settled_once(root, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "available_bytes", lambda _: 9_000_000)
    capture(root, tmp_path / "acts", num_samples=60)
    settled = read_manifest(tmp_path / "acts", "capture_activations").arguments["batch_tokens"]
    assert 256 <= settled < 4096
    monkeypatch.undo()
    capture(root, tmp_path / "acts", num_samples=120)
    manifest = read_manifest(tmp_path / "acts", "capture_activations")
    assert manifest.arguments["batch_tokens"] == settled
    assert manifest.counts["n_sentences"] == 120
    assert read_manifest(root / "acts", "capture_activations").arguments["batch_tokens"] == 4096


def test_a_shard_that_a_broken_run_left_shortened_is_made_again(root, tmp_path):
    out = tmp_path / "acts"
    shutil.copytree(root / "acts", out)
    (out / "capture_activations.manifest.json").rename(out / "capture_activations.partial.json")
    shard = out / "layer_2" / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:-5])
    (out / ".capture_activations.manifest.json.12345.tmp").write_text("{")
    capture(root, out)
    assert tree_bytes(out) == tree_bytes(root / "acts")
    assert not list(out.glob(".*"))


def test_a_dataset_is_read_by_uri(root, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in sorted((root / "data").iterdir()):
        memory.pipe_file(f"/somewhere/{path.name}", path.read_bytes())
    capture(root, tmp_path / "acts", dataset_dir="memory://somewhere")
    assert tree_bytes(tmp_path / "acts") == tree_bytes(root / "acts")


class _RefusedError(Exception):
    """Like httpx's: no OSError."""


class BrokenFileSystem(fsspec.get_filesystem_class("memory")):
    """Fails at once under broken://, and from the third file that is opened under late://."""

    protocol = ("broken", "late")
    cachable = False
    n_opened = 0

    def info(self, path, **kwargs):
        if path.startswith("broken"):
            raise _RefusedError("connection refused")
        return super().info(path, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return path.replace("late://", "/").replace("broken://", "broken/")

    def _open(self, path, *args, **kwargs):
        BrokenFileSystem.n_opened += 1
        if BrokenFileSystem.n_opened > 2:
            raise PermissionError("token expired")
        return super()._open(path, *args, **kwargs)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("broken://somewhere", "_RefusedError: connection refused"),
        ("late://elsewhere", "PermissionError: token expired"),
        ("nonsense://somewhere", "nonsense"),
    ],
)
def test_what_a_remote_file_system_raises_is_one_error(root, tmp_path, uri, reason):
    for protocol in BrokenFileSystem.protocol:
        fsspec.register_implementation(protocol, BrokenFileSystem, clobber=True)
    BrokenFileSystem.n_opened = 0
    memory = fsspec.filesystem("memory")
    for path in sorted((root / "data").iterdir()):
        memory.pipe_file(f"/elsewhere/{path.name}", path.read_bytes())
    with pytest.raises(UserError, match=f"--dataset_dir {uri} cannot be read: .*{reason}"):
        capture(root, tmp_path / "acts", dataset_dir=uri)
    if uri.startswith("late"):
        assert BrokenFileSystem.n_opened == 3, "the files could be opened, and then not be read"
