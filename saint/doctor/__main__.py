"""Look a whole run over: `python -m saint.doctor RUN`.

Every manifest, checksum, SAE, evidence file, labels file and ledger below the directory is read;
what was made from what is told by the fingerprints that manifests hold. Nothing is changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae import load_sae
from saint.evidence.file import open_evidence
from saint.evidence.labels import load_labels
from saint.interpretation.ledger import Ledger
from saint.stage.errors import UserError, first_line
from saint.stage.manifests import Manifest, load_manifest, verify_file
from saint.stage.program import run_stage
from saint.stage.record_schema import read_record
from saint.stage.terminal import show, visible

# The stages in their order; what each leaves is what the next one reads.
STAGES = (
    "capture_activations",
    "sae_preprocessing",
    "sae_training",
    "sae_evaluation",
    "capture_top_activating_sentences",
    "interpret_top_sentences_send_batches",
    "interpret_top_sentences_retrieve_batches",
    "interpret_top_sentences_parse_responses",
    "latent_browser",
)
_WITHOUT_MANIFEST = ("latent_browser",)
# Inputs that a run makes itself; a language model or dataset lies elsewhere.
_OWN_SOURCES = ("store", "data", "b_pre", "sae", "evidence", "batches", "source")


@dataclass
class Diagnosis:
    """What was found below a run's directory.

    notes: what is there, one line each. problems: what is damaged, missing or unfinished. stale:
    what was made from something that is no longer here.
    """

    root: Path
    manifests: dict[Path, Manifest] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def trying(self, what: str, action: Callable[[], Any]) -> Any:
        """Return what `action` does; an expected error becomes a problem, and None."""
        try:
            return action()
        except (UserError, OSError) as error:
            line = first_line(error)
            self.problems.append(line if what in line else f"{what}: {line}")
        return None


def diagnose(root: Path) -> Diagnosis:
    """Look a run's directory over. Raises UserError where there is none, or nothing of ours."""
    if not root.is_dir():
        raise UserError(f"{root} is not a directory")
    found = Diagnosis(root)
    for path in _below(root, ".partial.json"):
        found.trying(str(path), lambda path=path: read_record(path))
        stage = _stage_of(path) or "a stage"
        found.unfinished.append(stage)
        found.problems.append(f"{path} is of a run of {stage} that has not ended")
    for path in _below(root, ".manifest.json"):
        manifest = found.trying(str(path), lambda path=path: load_manifest(path))
        if manifest is not None:
            found.manifests[path] = manifest
    if not (found.manifests or found.problems):
        raise UserError(f"{root} holds nothing that a stage made")
    for path, manifest in found.manifests.items():
        _check_files(found, path, manifest)
    _check_sources(found)
    _read_what_is_there(found)
    return found


def _below(root: Path, ending: str) -> Iterator[Path]:
    yield from (p for p in sorted(root.rglob(f"*{ending}")) if not p.name.startswith("."))


def _stage_of(path: Path) -> str:
    """The stage of a record in a directory; of one beside a single file its name does not say."""
    return next((stage for stage in STAGES if path.name.startswith(f"{stage}.")), "")


def _check_files(found: Diagnosis, path: Path, manifest: Manifest) -> None:
    before = len(found.problems)
    for name, expected in manifest.files.items():
        file = path.parent / name
        found.trying(str(file), lambda file=file, expected=expected: verify_file(file, expected))
    size = sum(file["bytes"] for file in manifest.files.values())
    state = "whole" if len(found.problems) == before else "damaged"
    found.notes.append(
        f"{path.parent.relative_to(found.root) / path.name.removesuffix('.manifest.json')}: "
        f"{manifest.stage}, {len(manifest.files)} files, {size / 1e6:.1f} MB, {state}"
    )


def _check_sources(found: Diagnosis) -> None:
    """Say what each output was made from, and which of these are not here as they were."""
    known: dict[str, str] = {}
    for path, manifest in found.manifests.items():
        name = str(path.parent.relative_to(found.root) / path.name)
        known[manifest.facts.get("captured_as", manifest.fingerprint)] = name
        known |= {file["xxh3"]: f"{name} ({n})" for n, file in manifest.files.items()}
    for path, manifest in found.manifests.items():
        for source, value in manifest.sources.items():
            if source not in _OWN_SOURCES or not isinstance(value, str):
                continue
            if value in known:
                found.notes.append(f"  {path.name} was made from {known[value]}")
            elif source in ("store", "data", "b_pre", "sae"):
                found.stale.append(
                    f"{path}: the {source} that it was made from is not in {found.root} as it was"
                )


def _read_what_is_there(found: Diagnosis) -> None:
    """Open SAEs, evidence, labels and ledgers, as the stages that read them would."""
    for path, manifest in found.manifests.items():
        if manifest.stage == "sae_training":
            for name in manifest.files:
                file = path.parent / name
                sae = found.trying(str(file), lambda file=file: load_sae(file, device="cpu"))
                if sae is not None:
                    config = sae.config
                    found.notes.append(
                        f"  {name}: {config.n_latents} latents of width {config.d_model}, "
                        f"k {config.k}, layer {config.layer} {config.hook_point}"
                    )
        if manifest.stage == "interpret_top_sentences_parse_responses":
            for name in manifest.files:
                if name.endswith("parsed_responses.yaml"):
                    file = path.parent / name
                    labels = found.trying(str(file), lambda file=file: load_labels(file))
                    found.notes.append(f"  {name}: {len(labels or {})} labels")
    for file in sorted(found.root.rglob("evidence.parquet")):
        evidence = found.trying(str(file), lambda file=file: open_evidence(file))
        if evidence is not None:
            found.notes.append(f"  {file.relative_to(found.root)}: {evidence.n_latents} latents")
    for file in sorted(found.root.rglob("*.ledger.jsonl")):
        ids = file.with_name(file.name.replace(".ledger.jsonl", ".yaml"))
        state = found.trying(str(file), lambda ids=ids: Ledger(ids).state())
        if state is not None:
            found.notes.append(f"  {file.relative_to(found.root)}: {len(state.status)} requests")


def next_command(found: Diagnosis) -> str:
    """Return the stage to run next, in words."""
    done = {manifest.stage for manifest in found.manifests.values()}
    if found.unfinished:
        return f"{found.unfinished[0]}.py with the arguments that it was begun with: it resumes"
    if found.problems:
        return "the stage whose files are damaged, with the same arguments and --overwrite"
    for stage in STAGES:
        if stage not in done and stage not in _WITHOUT_MANIFEST:
            return f"{stage}.py"
    return "latent_browser.py, or llama_3_inference_text_completion_gradio.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a run holds; exit with 1 when something in it is damaged or unfinished."""
    parser = argparse.ArgumentParser(description="Look a whole run over; nothing is changed.")
    parser.add_argument("run_dir", type=Path, help="the directory that the stages wrote to")
    found = diagnose(parser.parse_args(argv).run_dir)
    show("\n".join(found.notes))
    for line in found.stale:
        show(f"stale: {line}")
    for line in found.problems:
        print(visible(f"error: {line}"), file=sys.stderr)
    show(f"next: {next_command(found)}")
    if found.problems:
        sys.exit(1)


if __name__ == "__main__":
    run_stage(main)
