"""Whatever bytes lie where a file is read: it is read, or refused in one line; nothing else."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_3 import CheckpointError, load_llama, load_tokenizer
from sae import SAEConfig, TopKSparseAutoencoder, load_sae, save_sae
from saint.evaluation.compare import read_reports
from saint.evidence.file import open_evidence
from saint.evidence.labels import load_labels
from saint.interpretation.ledger import Ledger
from saint.stage.errors import UserError
from saint.stage.manifests import load_manifest
from saint.stage.workers import Workers
from saint.steering.concepts import load_concepts
from saint.steering.settings import (
    concept_from_json,
    parse_concept_setting,
    parse_setting,
    request_from_json,
    split_steer,
)
from saint.steering.showcase import load_showcase
from saint.store.activation_store import open_store
from saint.store.dataset import open_dataset
from saint.store.shuffled_rows import open_batched_rows
from saint.training.comparison import read_run
from saint.training.recipe import Recipe
from saint.training.trainer import Trainer
from tests.support.interpretation_data import row, write_evidence
from tests.support.tiny_steering import make_studio, write_setup

REFUSED = (UserError, CheckpointError)
MOST_GROWTH = 300 << 20  # bytes of Python objects that a small file may cost at most

quick = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd", "\x00", "1e999", "#896", "film=+8", 10**400])
)
junk = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@dataclass
class Kind:
    """A file of a run: where it lies, and what reads it."""

    path: Path = field(repr=False)
    read: Callable[[], Any] = field(repr=False)


def read_or_refuse(read: Callable[[], Any]) -> None:
    """Read, allowing a refusal of one line. Anything else that is raised fails the test."""
    tracemalloc.start()
    try:
        read()
    except REFUSED as error:
        assert 0 < len(str(error)) < 2000  # run_stage prints it as one line
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MOST_GROWTH


@pytest.fixture(scope="module")
def kinds(root: Path, tmp_path_factory) -> dict[str, Kind]:
    """One whole file of every kind, in a copy of the tiny run."""
    here = tmp_path_factory.mktemp("fuzz")
    for name in ("acts", "acts_batched", "data", "model"):
        shutil.copytree(root / name, here / name)
    sae = TopKSparseAutoencoder(SAEConfig(32, 64, 4, layer=2), device="cpu")
    sae.initialise(torch.zeros(32), seed=0)
    for suffix in (".pt", ".safetensors"):
        save_sae(here / f"sae{suffix}", sae)
    recipe = Recipe(
        n_latents=64, k=4, k_start=4, k_aux=8, dead_tokens=1000, batch_size=32, learning_rate=0.001
    )
    trainer = Trainer(sae, recipe, 10, Workers(0, 1, torch.device("cpu")), "dense")
    torch.save(trainer.state(), here / "step.pt")
    model_dir, sae_path = write_setup(tmp_path_factory.mktemp("studio"))
    studio, _ = make_studio(model_dir, load_sae(sae_path, device="cpu"))
    write_evidence(here / "evidence.parquet", [row(i) for i in range(4)])
    (here / "labels.yaml").write_text("3: {common_semantic: a film, certainty: 0.9}\n")
    (here / "concepts.yaml").write_text("film: {made_with: x, latents: {3: 0.5}}\n")
    (here / "ids.ledger.jsonl").write_text(
        '{"event": "run", "task": "explain", "config": {"model": "m"}}\n'
        '{"event": "intent", "intent": "0123456789", "kind": "batch", "task": "explain", '
        '"model": "m", "time": "2026-01-01T00:00:00+00:00", "units": {"explain-1": 1}}\n'
    )
    (here / "a.metrics.jsonl").write_text('{"step": 1, "val/fvu": 0.5}\n')
    (here / "report.json").write_text('{"sae": "a.pt", "fvu": 0.1}')
    (here / "showcase.json").write_text('{"format": "saint.showcase", "version": 1}')
    cpu, shard = {"device": torch.device("cpu"), "dtype": torch.float32}, "shard_00000.safetensors"

    def store() -> None:
        opened = open_store(here / "acts")
        for index in range(opened.n_shards):
            opened.read_shard(index).read(slice(0, None))

    def rows() -> None:
        opened = open_batched_rows(here / "acts_batched")
        opened.read("train", 0, opened.n_rows("train"))

    def sentences() -> None:
        dataset = open_dataset(here / "data")
        for group in dataset.row_groups:
            dataset.read(group)

    def evidence() -> None:
        opened = open_evidence(here / "evidence.parquet")
        opened.summary()
        opened.latent(2)

    captured, shuffled = "capture_activations.manifest.json", "sae_preprocessing.manifest.json"
    return {
        "manifest of a store": Kind(here / "acts" / captured, store),
        "shard": Kind(here / "acts" / "layer_2" / shard, store),
        "manifest of rows": Kind(here / "acts_batched" / shuffled, rows),
        "rows": Kind(here / "acts_batched" / "train_00000.safetensors", rows),
        "sentences": Kind(here / "data" / "part0.parquet", sentences),
        "params.json": Kind(here / "model/params.json", lambda: load_llama(here / "model", **cpu)),
        "weights": Kind(
            here / "model/consolidated.00.pth", lambda: load_llama(here / "model", **cpu)
        ),
        "tokenizer": Kind(
            here / "model/tokenizer.model",
            lambda: load_tokenizer(here / "model").encode("a b", bos=False),
        ),
        "SAE": Kind(here / "sae.pt", lambda: load_sae(here / "sae.pt", device="cpu")),
        "SAE, safetensors": Kind(
            here / "sae.safetensors", lambda: load_sae(here / "sae.safetensors", device="cpu")
        ),
        "SAE's config": Kind(
            here / "sae.json", lambda: load_sae(here / "sae.safetensors", device="cpu")
        ),
        "step checkpoint": Kind(here / "step.pt", lambda: trainer.read([here / "step.pt"])),
        "evidence": Kind(here / "evidence.parquet", evidence),
        "labels": Kind(here / "labels.yaml", lambda: load_labels(here / "labels.yaml")),
        "concepts": Kind(
            here / "concepts.yaml", lambda: load_concepts(here / "concepts.yaml", studio)
        ),
        "ledger": Kind(here / "ids.ledger.jsonl", lambda: Ledger(here / "ids.yaml").state()),
        "metrics": Kind(here / "a.metrics.jsonl", lambda: read_run(here / "a.metrics.jsonl")),
        "evaluation": Kind(here / "report.json", lambda: read_reports([here / "report.json"])),
        "showcase": Kind(
            here / "showcase.json", lambda: load_showcase(here / "showcase.json", studio)
        ),
    }


NAMES = (
    "manifest of a store", "shard", "manifest of rows", "rows", "sentences", "params.json",
    "weights", "tokenizer", "SAE", "SAE, safetensors", "SAE's config", "step checkpoint",
    "evidence", "labels", "concepts", "ledger", "metrics", "evaluation", "showcase",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@quick
def test_damaged_bytes_are_read_or_refused(kinds, name: str, data):
    kind = kinds[name]
    whole = kind.path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    new = data.draw(st.binary(max_size=12))
    kept = data.draw(st.sampled_from([at, at + 1, at + len(new), len(whole)]))
    try:
        kind.path.write_bytes(whole[:at] + new + whole[kept:])
        read_or_refuse(kind.read)
    finally:
        kind.path.write_bytes(whole)


HOSTILE = {
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "a number too long to print": b"1" * 5000,
    "deep lists": b"[" * 100_000,
    "deep mappings": b'{"a":' * 50_000,
    "not UTF-8": b"\xff\xfe\x00",
    "not a number": b'{"step": NaN, "sae": Infinity}',
    "a long line": b'"' + b"a" * (8 << 20) + b'"',
    "aliases that grow": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefgh"),
    "a header that lies": struct.pack("<Q", 2**62) + b"{}",
    "a header beyond the file": struct.pack("<Q", 60_000_000) + b"{}",
    "a pickle that runs code": b"cos\nsystem\n(S'touch hacked'\ntR.",
    "parquet without a footer": b"PAR1" + b"\0" * 64 + b"PAR1",
    "another of its kind": json.dumps({"format": "other", "version": 99}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_hostile_files_are_read_or_refused(kinds, name: str):
    kind = kinds[name]
    whole = kind.path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for hostile in HOSTILE.values():
            kind.path.write_bytes(hostile)
            read_or_refuse(kind.read)
    finally:
        kind.path.write_bytes(whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB
    read_or_refuse(kind.read)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        found += [place for key, part in inner for place in places(part, (*path, key))]
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if "manifest" in n or n == "params.json"])
@given(data=st.data())
@quick
def test_other_values_in_json_are_read_or_refused(kinds, name: str, data):
    kind = kinds[name]
    whole = kind.path.read_bytes()
    record = json.loads(whole)
    *way, last = data.draw(st.sampled_from(places(record)))
    part = record
    for key in way:
        part = part[key]
    part[last] = data.draw(junk)
    try:
        kind.path.write_text(json.dumps(record))
        read_or_refuse(lambda: load_manifest(kind.path) if "manifest" in name else kind.read())
        read_or_refuse(kind.read)
    finally:
        kind.path.write_bytes(whole)


@given(record=junk, keys=st.dictionaries(st.sampled_from([
    "prompts", "settings", "concepts", "steer", "seed", "temperature", "max_new_tokens", "top_p",
    "where", "chat", "version", "latents", "means", "sae", "use",
]), junk))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_requests_and_concepts_are_read_or_refused(record, keys):
    for value in (record, keys, {"prompts": ["a"], "settings": [keys]}, {**keys, "prompts": ["a"]}):
        read_or_refuse(lambda value=value: request_from_json(value))
        read_or_refuse(lambda value=value: concept_from_json("a name", value))


@given(
    text=st.text(max_size=20) | st.from_regex(r"[\w #]{0,6}[=*][+-]?[\de.*of]{0,8}", fullmatch=True)
)
@settings(max_examples=300, deadline=None)
def test_steering_words_are_read_or_refused(text):
    for read in (parse_setting, parse_concept_setting, lambda text: split_steer([text])):
        read_or_refuse(lambda read=read: read(text))
