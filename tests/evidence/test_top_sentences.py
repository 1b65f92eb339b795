"""Top sentences and evidence against a brute-force dense computation, kills, ranks and ties."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import capture_top_activating_sentences as stage
from sae import SAEConfig, TopKSparseAutoencoder, standardise
from saint.evidence import rankings, sparse_activations
from saint.evidence.file import KINDS, EvidenceWriter, LatentBlock, open_evidence
from saint.kernels import cpu, fastest
from saint.stage.errors import UserError
from saint.stage.manifests import read_manifest
from saint.stage.workers import Workers
from saint.store import activation_store
from saint.store.activation_store import open_store
from tests.support import program
from tests.support.tiny_store import TinyStore, load, make_store

FILES = (*(f"top_sentences_{name}.yaml" for name in ("mean", "max", "last")), "evidence.parquet")
N = 10


def arguments(store: TinyStore, output: Path, *more: str) -> list[str]:
    paths = ["--data_dir", store.data_dir, "--model_path", store.sae_path]
    paths += ["--captured_data_output_dir", output]
    fixed = ["--top_n", N, "--window_tokens", 3, "--batch_tokens", 64, "--device", "cpu"]
    return [str(word) for word in (*paths, *fixed, *more)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def output(store: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "top"
    stage.main(arguments(store, path))
    return path


def canonical(store: TinyStore) -> list[int]:
    smallest: dict[tuple[int, ...], int] = {}
    for i in sorted(store.token_ids):
        smallest.setdefault(tuple(store.token_ids[i]), i)
    return sorted(smallest.values())


def brute_force(store: TinyStore, ranking: str, n: int) -> dict[int, list[tuple[float, int]]]:
    """Sort all sentences per latent: best first, ties by the smaller sentence_id."""
    score = {
        "mean": lambda dense: np.float32(dense.astype(np.float64).mean(axis=0)),
        "max": lambda dense: dense.max(axis=0),
        "last": lambda dense: dense[-1],
    }[ranking]
    scores = {i: score(store.dense[i]) for i in canonical(store)}
    result = {}
    for latent in range(store.n_latents):
        rows = [(-float(scores[i][latent]), i) for i in scores if scores[i][latent] > 0]
        result[latent] = [(-value, i) for value, i in sorted(rows)[:n]]
    return result


def digests(output: Path) -> dict[str, str]:
    manifest = read_manifest(output, stage.STAGE)
    return {name: facts["xxh3"] for name, facts in manifest.files.items()}


@pytest.mark.parametrize("ranking", ["mean", "max", "last"])
def test_rankings_equal_brute_force(store: TinyStore, output: Path, ranking: str) -> None:
    written = yaml.safe_load((output / f"top_sentences_{ranking}.yaml").read_text())
    expected = brute_force(store, ranking, N)
    assert list(written) == list(range(store.n_latents))
    for latent, rows in expected.items():
        values = [value for value, _ in written[latent]]
        assert values == sorted(values), "values ascend in the file"
        assert [i for _, i in written[latent]] == [i for _, i in reversed(rows)]
        np.testing.assert_allclose(values, [v for v, _ in reversed(rows)], rtol=1e-6)
    assert [written[latent] for latent in range(5)] == [[]] * 5, "dead latents have no sentence"


def test_the_case_has_ties_and_duplicates(store: TinyStore) -> None:
    ties = [
        len(rows) - len({value for value, _ in rows})
        for rows in brute_force(store, "max", N).values()
    ]
    assert sum(ties) > 20
    assert len(canonical(store)) < len(store.token_ids)
    assert min(map(len, store.token_ids.values())) == 1


def test_evidence_repeats_the_rankings_and_counts(store: TinyStore, output: Path) -> None:
    evidence = open_evidence(output / "evidence.parquet")
    everything = np.concatenate(list(store.dense.values()))
    for row in evidence.iter_latents():
        i = row["latent"]
        column = everything[:, i]
        for ranking in ("mean", "max", "last"):
            expected = [s for _, s in brute_force(store, ranking, N)[i]]
            assert [pair["sentence_id"] for pair in row[f"top_{ranking}"]] == expected
        assert row["n_firing_tokens"] == (column > 0).sum()
        assert row["n_firing_sentences"] == sum((d[:, i] > 0).any() for d in store.dense.values())
        assert row["density"] == pytest.approx((column > 0).mean())
        assert row["max_activation"] == pytest.approx(column.max())
        bins = np.linspace(0, column.max(), 21)
        expected_bins = np.clip(np.digitize(column[column > 0], bins, right=True), 1, 20) - 1
        assert np.array_equal(row["histogram"], np.bincount(expected_bins, minlength=20))


def test_windows_hold_the_sentences_tokens_and_activations(store: TinyStore, output: Path) -> None:
    for row in open_evidence(output / "evidence.parquet").iter_latents():
        for example in row["examples"]:
            tokens = store.token_ids[example["sentence_id"]]
            dense = store.dense[example["sentence_id"]][:, row["latent"]]
            start = max(0, example["position"] - 3)
            end = min(len(tokens), example["position"] + 4)
            assert example["start"] == start
            assert example["token_ids"] == tokens[start:end]
            assert example["tokens"] == [f" w{t}" for t in tokens[start:end]]
            np.testing.assert_allclose(example["activations"], dense[start:end], rtol=1e-6)
            assert example["value"] == pytest.approx(dense.max())
            if example["kind"] in ("top", "quantile"):
                assert example["position"] == dense.argmax() and dense.max() > 0
            else:
                assert dense.max() == 0 and example["decile"] == -1


def test_splits_are_disjoint_balanced_and_over_deciles(store: TinyStore, output: Path) -> None:
    for row in open_evidence(output / "evidence.parquet").iter_latents():
        examples = [e for e in row["examples"] if e["kind"] != "top"]
        sentences = [e["sentence_id"] for e in examples]
        assert len(sentences) == len(set(sentences)), "no sentence is used twice"
        assert {e["split"] for e in examples} <= {"explain", "test"}
        quantile = [e for e in examples if e["kind"] == "quantile"]
        n_firing = sum((store.dense[i][:, row["latent"]] > 0).any() for i in canonical(store))
        assert len(quantile) == min(40, n_firing) or n_firing > 40
        for kind in ("quantile", "near_miss", "random"):
            splits = [e["split"] for e in examples if e["kind"] == kind]
            assert abs(splits.count("explain") - splits.count("test")) <= 1
        strengths = [(e["decile"], e["value"]) for e in quantile]
        assert not strengths or max(strengths)[0] == 9, "the strongest is in the last decile"
        for decile in range(9):
            low = [v for d, v in strengths if d == decile]
            high = [v for d, v in strengths if d == decile + 1]
            assert not low or not high or max(low) <= min(high)
        if not row["n_firing_tokens"]:
            assert row["examples"] == []


def test_near_misses_are_the_most_similar_silent_sentences(store: TinyStore, output: Path) -> None:
    pooled: dict[int, np.ndarray] = {}
    activations = open_store(store.data_dir)
    for shard in map(activations.read_shard, range(activations.n_shards)):
        rows = standardise(shard.read())[0].numpy()
        bounds = shard.offsets.tolist()
        for sentence, low, high in zip(
            shard.sentence_ids.tolist(), bounds, bounds[1:], strict=False
        ):
            pooled[sentence] = rows[low:high].mean(axis=0)
    centre = np.mean([pooled[i] for i in canonical(store)], axis=0)
    unit = {i: (v - centre) / np.linalg.norm(v - centre) for i, v in pooled.items()}
    n_checked = 0
    for row in open_evidence(output / "evidence.parquet").iter_latents():
        chosen = {
            kind: [e["sentence_id"] for e in row["examples"] if e["kind"] == kind] for kind in KINDS
        }
        if not chosen["top"]:
            continue
        query = np.sum([unit[i] for i in chosen["top"]], axis=0)
        query /= np.linalg.norm(query)
        silent = [i for i in canonical(store) if not store.dense[i][:, row["latent"]].any()]
        left = [i for i in silent if i not in chosen["random"]]
        expected = sorted((unit[i] @ query for i in left), reverse=True)[:20]
        np.testing.assert_allclose(
            [unit[i] @ query for i in chosen["near_miss"]], expected, atol=2e-3
        )
        assert len(chosen["random"]) == min(20, len(silent))
        n_checked += len(expected)
    assert n_checked > 300


def test_coactive_and_neighbours_equal_dense(store: TinyStore, output: Path) -> None:
    kept = np.concatenate([store.dense[i] for i in canonical(store)]) > 0
    both = kept.T.astype(int) @ kept.astype(int)
    n = np.diag(both)
    jaccard = both / np.maximum(n[:, None] + n[None] - both, 1)
    np.fill_diagonal(jaccard, 0)
    decoder = stage.load_sae(store.sae_path, device="cpu").W_dec.numpy()
    cosine = decoder @ decoder.T
    np.fill_diagonal(cosine, -2)
    for row in open_evidence(output / "evidence.parquet").iter_latents():
        i = row["latent"]
        expected = np.sort(jaccard[i])[::-1][:10]
        found = [pair["jaccard"] for pair in row["coactive"]]
        np.testing.assert_allclose(found, expected[expected > 0], rtol=1e-5)
        for pair in row["coactive"]:
            assert pair["jaccard"] == pytest.approx(jaccard[i, pair["latent"]])
        assert [p["latent"] for p in row["neighbours"]] == np.argsort(-cosine[i])[:10].tolist()


def test_two_ranks_write_the_same_bytes(store: TinyStore, output: Path, tmp_path: Path) -> None:
    ranks = program.call_ranks(2, stage.STAGE, *arguments(store, tmp_path / "two"))
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    assert digests(tmp_path / "two") == digests(output)
    assert not (tmp_path / "two" / stage.WORK_DIR).exists()


def test_entries_that_are_too_many_for_memory_wait_in_a_file(
    store: TinyStore, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memmap, made = np.memmap, []
    monkeypatch.setattr(sparse_activations, "_SPOOLED_BYTES", 100)
    monkeypatch.setattr(np, "memmap", lambda *a, **k: made.append(a) or memmap(*a, **k))
    stage.main(arguments(store, tmp_path / "spooled"))
    assert len(made) == 2 * open_store(store.data_dir).n_shards
    assert digests(tmp_path / "spooled") == digests(output)


def test_killed_run_resumes_with_the_same_bytes(
    store: TinyStore, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Path] = []
    write = sparse_activations.write_sparse

    def write_then_die(path: Path, shard: object) -> None:
        if encoded:
            raise KeyboardInterrupt
        encoded.append(path)
        write(path, shard)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(sparse_activations, "write_sparse", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        stage.main(arguments(store, tmp_path))
    with pytest.raises(UserError, match="incomplete"):
        read_manifest(tmp_path, stage.STAGE)
    before = encoded[0].stat().st_mtime_ns
    monkeypatch.setattr(sparse_activations, "write_sparse", write)
    monkeypatch.setattr(stage.shutil, "rmtree", lambda _: None)
    stage.main(arguments(store, tmp_path))
    assert encoded[0].stat().st_mtime_ns == before, "an encoded shard is not encoded again"
    assert digests(tmp_path) == digests(output)


def test_kill_nine_at_any_time_resumes(store: TinyStore, output: Path, tmp_path: Path) -> None:
    words = arguments(store, tmp_path / "top")
    process = program.start(stage.STAGE, *words, output=tmp_path / "log")
    tmp_path = tmp_path / "top"
    while process.is_alive() and not (tmp_path / stage.WORK_DIR).exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    (tmp_path / "response_ids.yaml").write_text("[]")
    stage.main(arguments(store, tmp_path))
    assert digests(tmp_path) == digests(output)
    assert (tmp_path / "response_ids.yaml").exists(), "other stages' files stay"


def test_killed_at_any_write_it_ends_with_the_same_bytes(
    store: TinyStore, output: Path, tmp_path: Path
) -> None:
    words = arguments(store, tmp_path / "top")
    kills, rng = 0, random.Random(0)
    for _ in range(10):
        died = program.call(stage.STAGE, *words, die_at=rng.randint(2, 110))
        assert died.returncode in (0, -signal.SIGKILL), died.stderr
        kills += died.returncode == -signal.SIGKILL
        if died.returncode == 0:
            shutil.rmtree(tmp_path / "top")
    finished = program.call(stage.STAGE, *words)
    assert finished.returncode == 0 and kills > 4, finished.stderr
    assert digests(tmp_path / "top") == digests(output)
    assert sorted(path.name for path in (tmp_path / "top").iterdir()) == sorted(
        path.name for path in output.iterdir()
    )


def die_in_the_evidence(words: list[str]) -> None:
    write = EvidenceWriter.write

    def write_and_die(self: EvidenceWriter, block: LatentBlock) -> None:
        write(self, block)
        os.kill(os.getpid(), signal.SIGKILL)

    EvidenceWriter.write = write_and_die
    stage.main(words)


def test_killed_while_evidence_is_written_it_ends_with_the_same_bytes(
    store: TinyStore, output: Path, tmp_path: Path
) -> None:
    words = arguments(store, tmp_path / "top")
    process = program.fork(die_in_the_evidence, words)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    torn = [path.name for path in (tmp_path / "top").glob(".*.tmp")]
    assert len(torn) == 1 and torn[0].startswith(".evidence.parquet")
    assert "an earlier run encoded all" in program.call(stage.STAGE, *words).last_line
    assert digests(tmp_path / "top") == digests(output)
    assert not list((tmp_path / "top").glob(".*"))


@pytest.mark.parametrize("die_at", [{1: 9}, {1: 24}, {0: 26}, {0: 60}])
def test_a_rank_that_is_killed_resumes_on_two_and_on_one(
    store: TinyStore, output: Path, tmp_path: Path, die_at: dict[int, int]
) -> None:
    words = arguments(store, tmp_path / "top")
    ranks = program.call_ranks(2, stage.STAGE, *words, die_at=die_at)
    (rank,) = die_at
    assert ranks[rank].returncode == -signal.SIGKILL
    shutil.copytree(tmp_path / "top", tmp_path / "copy")
    ranks = program.call_ranks(2, stage.STAGE, *words)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    assert digests(tmp_path / "top") == digests(output)
    assert program.call(stage.STAGE, *arguments(store, tmp_path / "copy")).returncode == 0
    assert digests(tmp_path / "copy") == digests(output)


def test_the_encoder_is_the_one_that_training_has(
    store: TinyStore, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cpu.is_available():
        pytest.skip("no C++ compiler")
    with monkeypatch.context() as patch:
        patch.setattr(TopKSparseAutoencoder, "encode", None)
        stage.main(arguments(store, tmp_path / "cpp"))

    def none(_: int) -> None:
        raise UserError("no compiler")

    monkeypatch.setattr(fastest, "fastest_cpu_kernels", none)
    stage.main(arguments(store, tmp_path / "torch"))
    assert digests(tmp_path / "cpp") == digests(tmp_path / "torch") == digests(output)


@pytest.mark.parametrize("d_model", [64, 320])
def test_the_fastest_encoder_is_exact_and_gives_ties_to_the_first_latent(d_model: int) -> None:
    sae = TopKSparseAutoencoder(SAEConfig(d_model, 200, 8, layer=1)).requires_grad_(False)
    sae.initialise(torch.zeros(d_model), seed=0)
    sae.W_enc[100:] = sae.W_enc[:100]  # every latent has a twin
    x = standardise(torch.randn(70, d_model, generator=torch.Generator().manual_seed(0)))[0]
    encode = fastest.fastest_encode(sae)
    values, indices = encode(x).matrices()
    # In float64, the i-th latent and its twin are equally strong.
    best = (x.double() @ sae.W_enc[:100].double().T).topk(4, dim=1)
    wanted = torch.cat([best.indices, best.indices + 100], dim=1).sort(dim=1)
    assert torch.equal(indices.sort(dim=1).values, wanted.values)
    torch.testing.assert_close(
        values.sort(dim=1).values[:, ::2], best.values.float().flip(1), rtol=1e-5, atol=1e-5
    )
    if not cpu.is_available():
        return
    sae.config = SAEConfig(d_model, 200, 7, layer=1)  # the last one kept has a twin that is not
    kept = encode(x).matrices()[1].sort(dim=1).values
    last = best.indices[:, 3:] + 100
    assert torch.equal(kept, wanted.values[wanted.values != last].view(-1, 7))
    again = torch.cat([encode(part).matrices()[1] for part in x.split(9)]).sort(dim=1).values
    assert torch.equal(again, kept)


def test_done_other_arguments_and_overwrite(
    store: TinyStore, output: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(output, tmp_path / "top")
    output = tmp_path / "top"
    (output / "parsed.yaml").write_text("{}")
    before = (output / "evidence.parquet").stat().st_mtime_ns
    caplog.set_level("INFO", logger="saint")
    stage.main(arguments(store, output))
    assert "done already" in caplog.text
    assert (output / "evidence.parquet").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--top_n 10, this run has 3"):
        stage.main(arguments(store, output, "--top_n", "3"))
    stage.main(arguments(store, output, "--top_n", "3", "--overwrite"))
    assert len(open_evidence(output / "evidence.parquet").latent(9)["top_max"]) <= 3
    assert (output / "parsed.yaml").exists()


def test_a_bare_state_dict_without_maxima_works(
    store: TinyStore, output: Path, tmp_path: Path
) -> None:
    record = torch.load(store.sae_path, weights_only=True)
    torch.save(record["state_dict"], tmp_path / "bare.pt")
    words = arguments(store, tmp_path / "top", "--model_path", str(tmp_path / "bare.pt"))
    with pytest.raises(UserError, match="--k"):
        stage.main(words)
    assert not (tmp_path / "top").exists()
    stage.main([*words, "--k", "4"])
    mine, full = digests(tmp_path / "top"), digests(output)
    assert all(mine[name] == full[name] for name in FILES[:3])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer", "3"], "layer"),
        (["--hook_point", "mlp_out"], "hook"),
        (["--data_dir", "nowhere"], "nowhere does not exist"),
        (["--model_path", "nothing.pt"], "nothing.pt does not exist"),
        (["--model_dir", "no_model"], "no_model is not a directory"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    store: TinyStore, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stage.main(arguments(store, tmp_path / "top", *more))
    assert not (tmp_path / "top").exists()


def test_a_corrupt_shard_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, n_sentences=30)
    path = store.data_dir / "layer_1" / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard_00001.safetensors is corrupt"):
        stage.main(arguments(store, tmp_path / "top"))
    assert not [path for path in (tmp_path / "top").glob("*") if path.name in FILES]
    ranks = program.call_ranks(2, stage.STAGE, *arguments(store, tmp_path / "ranks"))
    assert "shard_00001.safetensors is corrupt" in ranks[1].last_line
    assert not [path for path in (tmp_path / "ranks").glob("*") if path.name in FILES]


@pytest.mark.parametrize("tensor", ["offsets", "sentence_ids", "token_ids"])
def test_a_shard_whose_index_is_damaged_is_named(tmp_path: Path, tensor: str) -> None:
    store = make_store(tmp_path, n_sentences=30)
    path = store.data_dir / "layer_1" / "shard_00002.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + size])[tensor]["data_offsets"][0]
    data[8 + size + start + 9 : 8 + size + start + 15] = bytes([255] * 6)
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard_00002.safetensors is corrupt"):
        stage.main(arguments(store, tmp_path / "top"))


def test_a_rank_reads_only_its_own_shards_as_a_whole(
    store: TinyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    monkeypatch.setattr(activation_store, "verify_file", lambda p, _: verified.append(p.name))
    opened = open_store(store.data_dir)
    index = sparse_activations.SentenceIndex.of(opened)
    assert not verified and len(index.sentence_ids) == opened.n_sentences
    workers = Workers(1, 2, torch.device("cpu"))
    monkeypatch.setattr(sparse_activations, "merge_ranks", lambda *_: None)
    monkeypatch.setattr(Workers, "gather", lambda _, value: [value])
    sae, tally = load(store), rankings.Tally(store.n_latents, N, 0, 0)
    sparse_activations.tally_store(sae, opened, index, tally, tmp_path, 64, workers)
    assert verified == ["shard_00001.safetensors"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 6))
def test_top_n_equals_sorting_whatever_the_order(seed: int, n: int, n_parts: int) -> None:
    rng = np.random.default_rng(seed)
    m, n_latents = 200, 6
    latents = rng.integers(0, n_latents, m)
    values = (rng.integers(0, 8, m) / 4).astype(np.float32)  # many ties and zeros
    ids = rng.permutation(m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankings, "_MIN_ROWS", 16)  # so that thresholds rise and rows are dropped
        tops = [rankings.TopN(n_latents, n) for _ in range(2)]
        for part in np.array_split(rng.permutation(m), n_parts):
            top = tops[rng.integers(0, 2)]
            top.offer(latents[part], values[part], part, ids, ids[part].astype(np.float32))
            if rng.integers(0, 2):
                top.merge()
        tops[0].absorb(tops[1].state())
    for latent in range(n_latents):
        rows = [(-values[j], ids[j]) for j in range(m) if latents[j] == latent and values[j] > 0]
        expected = sorted(rows)[:n]
        kept = tops[0].ids[latent] >= 0
        assert tops[0].ids[latent][kept].tolist() == [i for _, i in expected]
        assert tops[0].values[latent][kept].tolist() == [-v for v, _ in expected]
        assert tops[0].payload[latent][kept].tolist() == [i for _, i in expected]
        assert not tops[0].values[latent][~kept].any()


def test_priority_sample_is_uniform_and_seeded() -> None:
    ids = rankings.hash64(np.arange(2000))
    others = rankings.hash64(rankings.hash64(np.arange(50)))[:, None]
    drawn = 1 / rankings.priority(others, ids)
    assert 0.49 < drawn.mean() < 0.51 and 0 < drawn.min() and drawn.max() <= 1
    assert np.array_equal(drawn[0], 1 / rankings.priority(others[0], ids))
    correlation = np.corrcoef(drawn)
    assert np.abs(correlation - np.eye(50)).max() < 0.12


def test_mix_is_splitmix64() -> None:
    # First outputs of the reference generator seeded with 1234567.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * gamma) % 2**64 for i in range(3)], np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert rankings.hash64(states).tolist() == expected


@pytest.mark.parametrize("n_latents", [40, 1 << 20])
@pytest.mark.parametrize("compiled", [False, True])
def test_pairs_equal_a_loop_with_32_and_64_bit_keys(n_latents: int, compiled: bool) -> None:
    if compiled and not cpu.is_available():
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 300)
    offsets = np.concatenate([[0], lengths.cumsum()])
    step = n_latents // 8
    indices = (rng.integers(0, step, (offsets[-1], 8)) + step * np.arange(8)).astype(np.int32)
    values = rng.random(indices.shape, np.float32).clip(0.3) - np.float32(0.3)
    held = rng.random(indices.shape) < 0.7  # tokens differ in how many latents they have
    entries = np.concatenate([[0], held.sum(axis=1).cumsum()])[offsets]
    flat = values[held], indices[held], entries
    if compiled:
        parts = cpu.reduce_by_sentence(*flat, n_latents)
        order = np.lexsort((parts[0], parts[1]))
        pairs = rankings.Pairs(*(column[order] for column in parts))
    else:
        pairs = rankings.reduce_by_sentence(*flat)
    expected: dict[tuple[int, int], list[float]] = {}
    for sentence in range(len(lengths)):
        for row in range(offsets[sentence], offsets[sentence + 1]):
            mine = indices[row][held[row]].tolist(), values[row][held[row]].tolist()
            for latent, value in zip(*mine, strict=True):
                if value > 0:
                    expected.setdefault((latent, sentence), []).append(value)
    keys = sorted(expected)
    assert list(zip(pairs.latents.tolist(), pairs.sentences.tolist(), strict=True)) == keys
    np.testing.assert_allclose(pairs.sums, [sum(expected[key]) for key in keys], rtol=1e-12)
    assert pairs.n_tokens.tolist() == [len(expected[key]) for key in keys]
    assert pairs.maxima.tolist() == [max(expected[key]) for key in keys]
