"""Which latents are asked about, and with what evidence: from the evidence file or the YAML."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from saint.evidence.file import Evidence, open_evidence
from saint.evidence.labels import SET_SIZE, Label
from saint.evidence.rankings import RANKINGS
from saint.interpretation.client import RequestForm
from saint.interpretation.held_out import test_prompts
from saint.interpretation.ledger import Ledger, parse_custom_id, unit_name
from saint.interpretation.prices import RequestTally
from saint.interpretation.prompts import (
    LABELLED_TASKS,
    Prompt,
    PromptOptions,
    effect_prompt,
    explain_prompt,
    explain_sentences_prompt,
    label_hash,
    request_params,
)
from saint.stage.errors import UserError, log
from saint.stage.manifests import file_checksum
from saint.stage.yaml_files import load_yaml
from saint.store.dataset import SentenceDataset, fetch_sentences, open_dataset

_SAMPLED = 100  # latents whose requests are counted for a table of prices
# (prompt, plain, steered) texts of a latent, for the task effect.
Completions = Callable[[int], Sequence[tuple[str, str, str]]]


@dataclass(frozen=True)
class Question:
    """One request to be: its task (also "detect_control"), latent, label hash, part and prompt."""

    task: str
    latent: int
    label: str | None
    prompt: Prompt
    part: int | None = None

    @property
    def unit(self) -> str:
        """Its name in the ledger, whatever the attempt."""
        return unit_name(self.task, self.latent, self.label, self.part)

    @property
    def whole_unit(self) -> str:
        """The name under which an older version asked the whole test at once."""
        return unit_name(self.task, self.latent, self.label, None)


@dataclass(frozen=True)
class Source:
    """Where the evidence comes from. rows: latent -> ascending [[value, sentence_id], …] (YAML)."""

    ranking: str | None
    evidence: Evidence | None
    evidence_path: Path | None
    rows: Mapping[int, list[list[float]]]
    dataset: SentenceDataset | None
    fingerprint: str

    @property
    def kind(self) -> str:
        """What the prompts are made from: "evidence" or "sentences"."""
        return "evidence" if self.evidence else "sentences"

    def n_sentences(self) -> dict[int, int]:
        """Latent -> number of sentences on which it fires, as far as the source knows."""
        if self.evidence is None:
            return {latent: len(rows) for latent, rows in self.rows.items()}
        table = self.evidence.summary()
        latents, counts = table.column("latent"), table.column("n_firing_sentences")
        return dict(zip(latents.to_pylist(), counts.to_pylist(), strict=True))


def ranking_of(path: Path) -> str | None:
    """The ranking that a YAML's name ends in ("top_sentences_mean.yaml" -> "mean")."""
    word = path.stem.rsplit("_", 1)[-1]
    return word if word in RANKINGS else None


def open_source(
    yaml_path: Path, evidence_path: Path | None, dataset_dir: str | None, *, text_column: str
) -> Source:
    """Open the evidence file beside the YAML, or the YAML and the dataset where there is none.

    Raises UserError when neither is there, or the sentences' texts cannot be had.
    """
    ranking = ranking_of(yaml_path)
    beside = yaml_path.parent / "evidence.parquet"
    if evidence_path is None and ranking and beside.exists():
        evidence_path = beside
    if evidence_path is None and not yaml_path.exists():
        raise UserError(
            f"{yaml_path} does not exist (nor an evidence.parquet beside it): run "
            "capture_top_activating_sentences.py first"
        )
    dataset = open_dataset(dataset_dir, text_column=text_column) if dataset_dir else None
    if evidence_path is not None:
        evidence = open_evidence(evidence_path)
        if ranking in ("mean", "last") and dataset is None:
            log.info("without --dataset_dir the prompts hold windows only, no whole sentences")
        mark = file_checksum(evidence_path)["xxh3"]
        return Source(ranking or "max", evidence, evidence_path, {}, dataset, mark)
    if dataset is None:
        raise UserError("--dataset_dir is needed: there is no evidence.parquet with the texts")
    rows = _check_rows(load_yaml(yaml_path), yaml_path)
    return Source(ranking, None, None, rows, dataset, file_checksum(yaml_path)["xxh3"])


def _check_rows(rows: Any, path: Path) -> dict[int, list[list[float]]]:
    if not isinstance(rows, dict) or not all(
        isinstance(latent, int) and isinstance(pairs, list) for latent, pairs in rows.items()
    ):
        raise UserError(f"{path} is not a mapping of latents to [[value, sentence_id], …]")
    for latent, pairs in rows.items():
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int)):
                raise UserError(
                    f"{path}: latent {latent} has a row that is not [value, sentence_id]"
                )
    return rows


def choose_latents(
    source: Source, wanted: str | None, min_sentences: int, labels: Mapping[int, Label] | None
) -> list[int]:
    """Latents that fire in at least min_sentences sentences (and are labelled), ascending.

    wanted: such as "5,17,100-199", None for all. Raises UserError for an unknown latent, or when
    none is left.
    """
    counts = source.n_sentences()
    chosen = parse_latents(wanted) if wanted else sorted(counts)
    if unknown := [i for i in chosen if i not in counts]:
        raise UserError(f"--latents: there is no latent {unknown[0]}")
    chosen = [i for i in chosen if counts[i] >= min_sentences]
    if labels is not None:
        chosen = [i for i in chosen if i in labels and labels[i].text]
    if not chosen:
        raise UserError("no latent is left to ask about: see --latents and --min_sentences")
    return chosen


def parse_latents(text: str) -> list[int]:
    """Read "5,17,100-199" as a sorted list without repetitions."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"--latents {text}: give numbers and ranges, such as 5,17,100-199")
        chosen |= set(range(int(first), int(last or first) + 1))
    return sorted(chosen)


def questions(
    task: str,
    source: Source,
    latents: list[int],
    options: PromptOptions,
    *,
    labels: Mapping[int, Label] | None = None,
    n_controls: int = 0,
    completions: Completions | None = None,
    effects: Mapping[int, Mapping[str, Any]] | None = None,
) -> Iterator[Question]:
    """Yield the questions of a task in the order of the latents, where the evidence suffices.

    labels: needed by detect and fuzz. n_controls: so many latents are also tested with the label
    of another latent (intruder: with excerpts of others), where nothing is to be found.
    completions: of a latent, and effects: rows of the effects file by latent, for effect.
    """
    if source.evidence is None:
        if task != "explain":
            raise UserError(f"--task {task} needs the evidence file: there is no evidence.parquet")
        yield from _from_sentences(source, latents, options)
        return
    labels = labels or {}
    controls = _controls(labels, latents, n_controls) if task in LABELLED_TASKS else {}
    strangers = _strangers(latents, n_controls) if task == "intruder" else {}
    texts = _ranked_texts(source, set(latents), options) if task == "explain" else {}
    for row in source.evidence.iter_latents(latents):
        latent = row["latent"]
        if task == "explain":
            prompt = explain_prompt(row, source.ranking or "max", texts.get(latent, {}), options)
            if prompt.key["n_firing"]:
                yield Question(task, latent, None, prompt)
        elif task == "effect":
            texts_of = completions(latent) if completions else ()
            prompt = effect_prompt(row, texts_of, options, (effects or {}).get(latent))
            if prompt is not None:
                yield Question(task, latent, None, prompt)
        elif task == "intruder":
            yield from _parts(task, latent, None, test_prompts(task, row, options))
            if latent in strangers:
                others = [source.evidence.latent(i) for i in strangers[latent]]
                prompts = test_prompts("intruder_control", row, options, strangers=others)
                yield from _parts("intruder_control", latent, None, prompts)
        else:
            label = labels[latent]
            prompts = test_prompts(task, row, options, label=label.text)
            for prompt in prompts:
                prompt.key["source"] = label.extra.get("source")
            yield from _parts(task, latent, label.text, prompts)
            if latent in controls:
                name, text = f"{task}_control", controls[latent]
                yield from _parts(name, latent, text, test_prompts(name, row, options, label=text))


def _parts(
    task: str, latent: int, label: str | None, prompts: Sequence[Prompt]
) -> Iterator[Question]:
    for part, prompt in enumerate(prompts, start=1):
        yield Question(task, latent, label_hash(label) if label else None, prompt, part)


def _controls(labels: Mapping[int, Label], latents: list[int], n: int) -> dict[int, str]:
    """Give n latents, chosen by hash, the label of the next one, if its text is another."""
    order = _by_hash(latents)
    pairs = zip(order, order[1:] + order[:1], strict=True)
    swapped = {a: labels[b].text for a, b in pairs if labels[a].text != labels[b].text}
    return dict(list(swapped.items())[:n])


def _strangers(latents: list[int], n: int) -> dict[int, list[int]]:
    """Give n latents, chosen by hash, the next few: one for each excerpt or shape of a set."""
    order, n_others = _by_hash(latents), SET_SIZE
    if len(order) <= n_others:
        return {}
    twice = order + order[:n_others]
    return {i: twice[place + 1 : place + 1 + n_others] for place, i in enumerate(order[:n])}


def _by_hash(latents: list[int]) -> list[int]:
    return sorted(latents, key=lambda i: hashlib.sha256(f"saint control {i}".encode()).digest())


def _ranked_texts(
    source: Source, latents: set[int], options: PromptOptions
) -> dict[int, dict[int, str]]:
    """Latent -> {sentence_id: text} of the best sentences, best first, for "mean" and "last"."""
    if source.dataset is None or source.ranking not in ("mean", "last") or not source.evidence_path:
        return {}
    # Some of them turn out to be held out for testing: read more than are shown.
    best = _best_ids(source.evidence_path, f"top_{source.ranking}", latents, options.n_top + 40)
    texts = fetch_sentences(source.dataset, {i for ids in best.values() for i in ids})
    return {latent: {i: texts[i] for i in ids} for latent, ids in best.items()}


def _best_ids(path: Path, column: str, latents: set[int], n: int) -> dict[int, list[int]]:
    best: dict[int, list[int]] = {}
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["latent", column]):
            for latent, pairs in zip(
                batch.column("latent").to_pylist(), batch.column(column), strict=True
            ):
                if latent in latents and pairs.values is not None:
                    best[latent] = pairs.values[:n].field("sentence_id").to_pylist()
    return best


def _from_sentences(
    source: Source, latents: Iterable[int], options: PromptOptions
) -> Iterator[Question]:
    assert source.dataset is not None
    best = {i: source.rows[i][::-1][: options.n_sentences] for i in latents}
    texts = fetch_sentences(
        source.dataset, {int(pair[1]) for rows in best.values() for pair in rows}
    )
    for latent, rows in best.items():
        ranked = [(float(value), int(i), texts[int(i)]) for value, i in rows]
        if ranked:
            prompt = explain_sentences_prompt(ranked, source.ranking, options)
            yield Question("explain", latent, None, prompt)


def shown_sentences(ledger: Ledger, latents: list[int]) -> dict[int, set[int]]:
    """Latent -> the sentences from which its label was made, as the ledger's requests say."""
    shown: dict[int, set[int]] = {}
    wanted = set(latents)
    for intent in ledger.state().intents.values():
        if intent.task == "explain" and intent.is_paid_for and not intent.superseded:
            for row in ledger.read_requests(intent.id):
                request = parse_custom_id(row["custom_id"])
                if request and request.latent in wanted:
                    shown.setdefault(request.latent, set()).update(row["key"]["shown"])
    if len(shown) < len(latents):
        log.warning(
            "%d of %d labels were not made by this ledger's requests: whether they have seen "
            "their test excerpts is not known",
            len(latents) - len(shown),
            len(latents),
        )
    return shown


def only_unseen(asked: Iterable[Question], shown: dict[int, set[int]]) -> Iterator[Question]:
    """Pass questions on; raises UserError where a label would be tested on what it was made of."""
    for question in asked:
        seen = shown.get(question.latent, set()) & set(question.prompt.key["tested"])
        if seen:
            raise UserError(
                f"latent {question.latent} would be tested on sentence {min(seen)}, which its "
                "label was made from: nothing was sent. Make the labels from this evidence file "
                "first (--task explain --overwrite)"
            )
        yield question


def sample_of_task(
    task: str, source: Source, latents: list[int], options: PromptOptions, form: RequestForm
) -> tuple[RequestTally, float]:
    """What some latents' requests of a task add up to, and how many times as many there are.

    Labels stand for those that are not there yet; effect's completions are as long as they may be.
    """
    some = latents if len(latents) <= _SAMPLED else random.Random(0).sample(latents, _SAMPLED)
    label = Label("ten words that say what these latents all fire on")
    text = ("x" * 40, "x" * options.excerpt_chars, "x" * options.excerpt_chars)
    tally = RequestTally()
    for question in questions(
        task,
        source,
        sorted(some),
        options,
        labels=dict.fromkeys(some, label),
        completions=lambda _: [text] * 3,
    ):
        tally.add(request_params(question.task, question.prompt, model="", form=form))
    return tally, len(latents) / len(some)
