"""A tiny model and dataset, every stage's arguments for them, and what is asked of their files."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import capture_activations
import capture_top_activating_sentences
import sae_preprocessing
from sae import save_sae
from saint.stage.manifests import Output
from saint.store.activation_store import ActivationStore, shard_file, shard_name
from tests.support.program import call
from tests.support.tiny_steering import WORDS, make_sae, one_thread

N_ROWS = 260
OVER_DISK = {"memory_gb": 0.02}


def write_dataset(path: Path, *, n_files: int = 2) -> Path:
    rng = random.Random(0)
    path.mkdir()
    for file in range(n_files):
        texts: list[str | None] = [
            " ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(N_ROWS // n_files)
        ]
        texts[3], texts[4], texts[5] = None, "", "   "
        table = pa.table({"text": texts, "other": range(len(texts))})
        pq.write_table(table, path / f"part{file}.parquet", row_group_size=40)
    return path


def capture_args(root: Path, out: Path, **changes) -> list[object]:
    flags = {
        "model_dir": root / "model",
        "dataset_dir": root / "data",
        "output_dir": out,
        "num_samples": 200,
        "layers": "2",
        "sentences_per_shard": 60,
        "max_token_length": 40,
        "dtype": "float32",  # "auto" is bfloat16 on some processors
    } | changes
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def preprocess_args(root: Path, **changes) -> list[object]:
    flags = {"input_dir": root / "acts", "batch_size": 64, "num_processes": 1} | changes
    flags = {"rows_per_file": 500} | flags
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def train_args(root: Path, save: Path, **changes) -> list[object]:
    flags = {
        "data_dir": root / "acts_batched",
        "b_pre_path": root / "acts_mean.pt",
        "model_save_path": save,
        "n_latents": 64,
        "k": 4,
        "num_epochs": 3,
        "logs_per_epoch": 5,
    } | changes
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def evaluate_args(root: Path, **changes) -> list[object]:
    flags = {
        "model_dir": root / "model",
        "sae_model_path": root / "trained_sae.pt",
        "dataset_dir": root / "data",
        "dtype": "float32",
    } | changes
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def top_args(root: Path, data_dir: Path, out: Path) -> list[object]:
    save_sae(root / "sae.pt", make_sae(layer=2))
    argv = ["--data_dir", data_dir, "--model_path", root / "sae.pt", "--top_n", 5]
    return [*argv, "--captured_data_output_dir", out, "--pool_sentences", 50]


def outputs(directory: Path) -> dict[str, Path]:
    return {"output_dir": directory / "rows", "mean_filepath": directory / "mean.pt"}


def capture(root: Path, out: Path, **changes: object) -> None:
    with one_thread():
        capture_activations.main([str(a) for a in capture_args(root, out, **changes)])


def preprocess(root: Path, *more: str, **changes: object) -> None:
    with one_thread():
        sae_preprocessing.main([*(str(a) for a in preprocess_args(root, **changes)), *more])


def top_sentences(root: Path, data_dir: Path, out: Path) -> bytes:
    with one_thread():
        argv = top_args(root, data_dir, out)
        capture_top_activating_sentences.main([str(a) for a in argv])
    return (out / "top_sentences_max.yaml").read_bytes()


def tree_bytes(directory: Path) -> dict[str, bytes]:
    """Every data file's bytes; manifests hold times."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and "manifest" not in p.name
    }


def run_twice(stage: str, arguments: list[object]) -> None:
    """Run a stage to its end; a second time it is done already. Both say what to look at next."""
    finished = call(stage, *arguments)
    assert finished.returncode == 0, finished.stderr
    again = call(stage, *arguments)
    assert again.returncode == 0 and "done already" in again.last_line, again.stderr
    assert names_what_is_next(finished.last_line) and names_what_is_next(again.last_line)


def names_what_is_next(line: str) -> bool:
    """A stage's last line ends with a page that exists, or with a command that can be typed."""
    if "; look at " in line:
        place = urlsplit(line.rpartition("; look at ")[2])
        return Path(unquote(place.path)).exists()
    script, *flags = line.rpartition("; next: ")[2].split()
    importlib.import_module(script.removesuffix(".py")).build_parser().parse_args(flags)
    return all(Path(path).exists() for path in flags[1::2])


def rows_of(store: ActivationStore) -> torch.Tensor:
    return torch.cat([store.read_shard(i).read() for i in range(store.n_shards)])


def sorted_rows(x: torch.Tensor) -> list[bytes]:
    return sorted(row.tobytes() for row in x.contiguous().view(torch.uint8).numpy())


def write_big_store(path: Path, *, n_rows: int, d_model: int) -> None:
    output = Output(path, "capture_activations", {}, {}, single_file=False)
    output.begin(overwrite=False)
    (path / "layer_1").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"] * 50}), path / "vocabulary.parquet")
    half, names = n_rows // 2, []
    for index in range(2):
        lists = [[(i + j * j) % 50 for j in range(10)] for i in range(half // 10)]
        names.append(f"layer_1/{shard_name(index)}")
        ids = [index * half + i for i in range(len(lists))]
        with shard_file(path / names[-1], lists, ids, d_model=d_model) as shard:
            for start in range(0, half, 1000):
                shard.write(
                    "activations", start, torch.randn(min(1000, half - start), d_model).bfloat16()
                )
    counts = {"n_shards": 2, "n_sentences": n_rows // 10, "n_tokens": n_rows}
    facts = {"layers": {"layer_1": {"layer": 1, "hook_point": "resid_pre"}}, "d_model": d_model}
    output.finish(facts=facts, counts=counts, files=[*names, "vocabulary.parquet"])
