"""A damaged copy of every kind of file that a stage reads, and the line that the stage prints."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.pipeline import capture_args, evaluate_args, preprocess_args, train_args
from tests.support.program import call
from tests.support.stage_faults import contents


@dataclass(frozen=True)
class Reading:
    """A kind of file, where an example of it lies, and a stage with arguments that reads it."""

    kind: str
    path: Path
    stage: str
    arguments: list[object]


@dataclass(frozen=True)
class Outcome:
    """What came of one damage. line: the stage's last one.

    verdict: "refused"; "as before", where the same came out of it; "other data", where the file has
    no checksum and the damaged one is as good a file; else "traceback" or an exit code.
    """

    kind: str
    damage: str
    verdict: str
    line: str


def readings(root: Path) -> list[Reading]:
    """Every kind of file below `root` (`stage_faults.make_inputs`, a run's checkpoint added)."""
    out, manifest = root / "out", "manifest.json"
    capture = ("capture_activations", capture_args(root, out / "acts"))
    files = {"output_dir": out / "rows", "mean_filepath": out / "mean.pt"}
    shuffle = ("sae_preprocessing", preprocess_args(root, **files))
    train = ("sae_training", train_args(root, out / "sae.pt", num_epochs=1))
    resume = ("sae_training", train_args(root, root / "begun" / "sae.pt", checkpoint_minutes=1e-6))
    rank: list[object] = ["--data_dir", root / "acts", "--model_path", root / "trained_sae.pt"]
    top = ("capture_top_activating_sentences", [*rank, "--captured_data_output_dir", out / "top"])
    evaluate = ("sae_evaluation", evaluate_args(root, output_path=out / "e.json", num_samples=40))
    evidence: list[object] = ["--evidence_path", root / "top" / "evidence.parquet"]
    browse = ("latent_browser", [*evidence, "--html", out / "l.html"])
    labelled = ("latent_browser", [*browse[1], "--labels_path", root / "labels.yaml"])
    bring_in = ("saint_exchange", ["import", root / "lens", "--output_path", out / "s.safetensors"])
    yaml_file = root / "top" / "top_sentences_max.yaml"
    ask = ["--top_sentences_dict_filepath", yaml_file, "--dry_run"]
    ask += ["--response_ids_filepath", out / "ids.yaml"]
    send = ("interpret_top_sentences_send_batches", ask)
    rows, begun = root / "acts_batched", root / "begun" / "sae_checkpoints"
    return [
        Reading("model, params.json", root / "model" / "params.json", *capture),
        Reading("model, weights", root / "model" / "consolidated.00.pth", *capture),
        Reading("model, tokenizer", root / "model" / "tokenizer.model", *capture),
        Reading("model, tokenizer's spec", root / "model" / "tokenizer_spec.json", *capture),
        Reading("dataset", root / "data" / "part0.parquet", *capture),
        Reading("store, shard", root / "acts" / "layer_2" / "shard_00001.safetensors", *shuffle),
        Reading("store, vocabulary", root / "acts" / "vocabulary.parquet", *top),
        Reading("store, texts", root / "acts" / "sentences.parquet" / "part-00001.parquet", *top),
        Reading("store, manifest", root / "acts" / f"capture_activations.{manifest}", *shuffle),
        Reading("rows", rows / "train_00000.safetensors", *train),
        Reading("rows, manifest", rows / f"sae_preprocessing.{manifest}", *train),
        Reading("mean", root / "acts_mean.pt", *train),
        Reading("mean, manifest", root / f"acts_mean.pt.{manifest}", *train),
        Reading("training, checkpoint", next(begun.glob("*.step_*.pt")), *resume),
        Reading("training, metrics", root / "begun" / "sae.metrics.jsonl", *resume),
        Reading("training, begun record", root / "begun" / "sae.pt.partial.json", *resume),
        Reading("SAE", root / "trained_sae.pt", *evaluate),
        Reading("SAE, manifest", root / f"trained_sae.pt.{manifest}", *top),
        Reading("evidence", root / "top" / "evidence.parquet", *browse),
        Reading("evidence, for questions", root / "top" / "evidence.parquet", *send),
        Reading("top sentences", yaml_file, *send),
        Reading("labels", root / "labels.yaml", *labelled),
        Reading("SAELens, cfg.json", root / "lens" / "cfg.json", *bring_in),
        Reading("SAELens, weights", root / "lens" / "sae_weights.safetensors", *bring_in),
    ]


def begin_training(root: Path) -> None:
    """Leave a run with checkpoints that has not ended."""
    save = root / "begun" / "sae.pt"
    arguments = train_args(root, save, checkpoint_minutes=1e-6)
    for event in range(80, 600, 40):
        died = call("sae_training", *arguments, die_at=event)
        if died.returncode and len(list(save.parent.glob("sae_checkpoints/*.step_*.pt"))) > 1:
            return
    raise AssertionError("no run was killed between two checkpoints")


def damages(path: Path, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Damages of a file's bytes, with their names."""
    whole = path.read_bytes()
    yield "cut in half", whole[: len(whole) // 2]
    yield "last byte missing", whole[:-1]
    yield "empty", b""
    for name, end in (("a bit flipped at its start", 64), ("a bit flipped anywhere", len(whole))):
        at = rng.randrange(min(end, len(whole)))
        yield name, whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]


def damage_table(
    root: Path, directory: Path, seed: int, only: tuple[str, ...] = ("",)
) -> Iterator[Outcome]:
    """Damage one kind of file after the other in a copy of `root`, and see what is said.

    only: damages whose names have one of these words.
    """
    copy, kept = directory / "copy", directory / "kept"
    shutil.copytree(root, kept)
    begin_training(kept)
    # The records hold paths: what is run is always at the same place.
    for reading in readings(kept):
        place = copy / reading.path.relative_to(kept)
        wanted = None
        for damage, data in [("none", None), *damages(reading.path, random.Random(seed))]:
            if data is not None and not any(word in damage for word in only):
                continue
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(kept, copy)
            if data is not None:
                place.write_bytes(data)
            here = [str(word).replace(str(kept), str(copy)) for word in reading.arguments]
            done = call(reading.stage, *here)
            made = {n: b for n, b in contents(copy).items() if copy / n != place}
            if data is None:
                assert done.returncode == 0, (reading.kind, done.stderr)
                wanted = made
                continue
            verdict = f"exit code {done.returncode}"
            if "Traceback" in done.stderr:
                verdict = "traceback"
            elif done.returncode == 0:
                verdict = "as before" if made == wanted else "other data"
            elif done.returncode == 1 and done.last_line.startswith("error: "):
                verdict = "refused"
            yield Outcome(
                reading.kind, damage, verdict, done.last_line.replace(str(copy) + "/", "")
            )
