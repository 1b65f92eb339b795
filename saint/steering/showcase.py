"""Concepts that were seen to show in what the model writes: the ones to put before a newcomer.

    python -m saint.steering.showcase --llama_model_dir M --sae_model_path trained_sae.pt

Candidates are nouns of the captured text that are neither rare nor everywhere, or those of a file
of word families. Each one's difference of means is turned up; those that make their own words
likely at a small loss are tried on four prompts, the better half on eight, with doses that should
cost 0.75 nat a token, and those that pass are written once more with a fresh seed. What then shows
in six of eight texts at no more than 1 nat is kept, with its texts, in `showcase.json` beside the
SAE: the demo's and the quickstart's examples. Texts are drawn as the demo draws them.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_3 import CheckpointError, HookPoint, Sampling
from saint.evidence.token_index import StoredTokens
from saint.evidence.words import MIN_LETTERS, is_content_word
from saint.stage.errors import UserError, log
from saint.stage.files import read_json, write_json
from saint.stage.flags import add_overwrite_flag, positive_int, seed_number
from saint.stage.manifests import Output, State, file_checksum, model_fingerprint
from saint.stage.program import run_stage
from saint.stage.terminal import FINAL
from saint.steering.concepts import (
    ConceptFinder,
    add_concept_flags,
    difference_of_means,
    open_finder,
    spellings,
    word_parts,
)
from saint.steering.effects import TEXT_PROMPTS, word_shows, words_of
from saint.steering.settings import Concept, concept_from_json
from saint.steering.studio import Dictionary, Studio, add_studio_flags, fingerprints, load_studio
from saint.steering.texts import Written, read_back, vector_edit, write

SHOWCASE = "showcase.json"
FORMAT, VERSION = "saint.showcase", 1
N_SHOWN = 4
N_TOKENS, SAMPLING = 40, Sampling(0.7, 0.95)  # as the demo's page writes
SHOWN_SHARE, SHOWN_LOSS, MOST_PLAIN = 6 / 8, 1.0, 2 / 8
DOSES = (0.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0)  # of the slider
_N_SCREENED, _N_TRIED, _N_AGAIN = 64, 12, 6
_FIRST_DOSE, _AIM, _LEAST, _MOST = 9.0, 0.75, 6.0, 13.0
_SCREEN_TEXTS, _SCREEN_TOKENS, _SCREEN_BLOCK = 2, 20, 16
_MAX_ROWS = 256  # of a candidate's own tokens
_LEAST_ROWS, _MOST_SHARE = 10, 0.0012  # of a candidate's token, of all tokens
_BEFORE_NOUNS = ("the", "a", "an", "of", "in", "his", "her", "their", "this", "for", "and")
_LEAST_NOUN = 0.35
_WORD = re.compile(r" [a-z]+")


@dataclass(frozen=True)
class Text:
    """One prompt's two texts. shows: whether the steered one has one of the concept's words."""

    prompt: str
    plain: str
    steered: str
    shows: bool
    seed: int


@dataclass(frozen=True)
class Shown:
    """A concept that shows. share, plain_share: of its texts. loss: nats per token, mean over them.

    family: the words that count as the concept, beside forms of its own. doses: the slider's, from
    0: {dose, text, loss} of the first prompt in which it shows.
    """

    concept: Concept
    dose: float
    share: float
    plain_share: float
    loss: float
    family: list[str]
    texts: list[Text]
    doses: list[dict[str, Any]]

    @property
    def best(self) -> Text:
        """The first text in which it shows."""
        return next((text for text in self.texts if text.shows), self.texts[0])


def family_shows(text: str, word: str, family: Sequence[str]) -> bool:
    """Whether a text has a form of a word, or a word of its family."""
    return word_shows(text, word) or not set(words_of(text)).isdisjoint(family)


def load_families(path: Path) -> dict[str, list[str]]:
    """Read {word: {"family": [words]}}. Raises UserError when it is no such file."""
    try:
        rows = read_json(path)
        return {str(word): [str(w).lower() for w in row["family"]] for word, row in rows.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} holds no word families: {error!r:.80}") from None


def candidates(studio: Studio, stored: StoredTokens, n: int = _N_SCREENED) -> list[str]:
    """Return nouns of one token, the most frequent of those that are not everywhere.

    A noun here: a content word whose plural is a token of the store too, and that follows an
    article, a pronoun or a preposition often enough.
    """
    counts = stored.counts()
    vocabulary = [studio.tokenizer.token_text(i) for i in range(len(counts))]
    ids = {text: i for i, text in enumerate(vocabulary) if _WORD.fullmatch(text)}
    before = np.isin(
        np.arange(len(vocabulary)), [ids[f" {w}"] for w in _BEFORE_NOUNS if f" {w}" in ids]
    )
    most = max(_LEAST_ROWS, _MOST_SHARE * counts.sum())
    found: list[tuple[int, str]] = []
    for text, i in ids.items():
        word = text[1:]
        if not _LEAST_ROWS <= counts[i] <= most or word.endswith("s"):
            continue
        plural = ids.get(text + "s", ids.get(text[:-1] + "ies") if text.endswith("y") else None)
        if plural is None or not counts[plural]:
            continue
        if not is_content_word(word, min_letters=MIN_LETTERS):
            continue
        rows = stored.rows_of(i, limit=_MAX_ROWS)
        rows = rows[rows > 0]
        if before[stored.token_ids(rows - 1)].mean() >= _LEAST_NOUN:
            found.append((int(counts[i]), word))
    return [word for _, word in sorted(found, key=lambda row: (-row[0], row[1]))[:n]]


@torch.no_grad()
def directions(finder: ConceptFinder, words: Sequence[str], sae: int = 0) -> Tensor:
    """Return each word's unit difference of means, (n_words, d_model)."""
    studio, stored = finder.studio, finder.stores[sae]
    assert stored is not None, "candidates come from a store"
    found, device = [], studio.model.device
    for word in words:
        parts = word_parts(stored, spellings(studio, word), _MAX_ROWS)
        found.append(difference_of_means(parts, finder.average(sae).z.cpu()).to(device))
    means = torch.stack(found)
    return means / torch.linalg.vector_norm(means, dim=1, keepdim=True)


@dataclass(frozen=True)
class Writer:
    """Writes steered texts after the same prompts, with plain ones beside them."""

    studio: Studio
    dictionary: Dictionary
    families: Mapping[str, Sequence[str]]
    prompts: Sequence[str] = TEXT_PROMPTS
    n_tokens: int = N_TOKENS

    def texts(self, vectors: Tensor, seed: int, prompts: Sequence[str]) -> list[Written]:
        """Write one text per row of vectors (n, d_model); equal prompts have equal draws."""
        ids = [self.studio.encode(prompt, chat=False) for prompt in prompts]
        seeds = [self.seed(seed, prompt) for prompt in prompts]
        model, tokenizer = self.studio.model, self.studio.tokenizer
        new = write(
            model, tokenizer, ids, n_tokens=self.n_tokens, seeds=seeds, sampling=SAMPLING,
            edits={self.dictionary.hook: vector_edit(vectors, first=int(self.studio.prepend_bos))},
        )  # fmt: skip
        return read_back(model, tokenizer, ids, new)

    def seed(self, seed: int, prompt: str) -> int:
        """A prompt's own seed in a round of writing."""
        return 1000 * seed + self.prompts.index(prompt)

    @torch.no_grad()
    def screen(self, words: Sequence[str], units: Tensor, plain: Sequence[Written]) -> list[int]:
        """Return the words' places, those first that rise most in plain texts for what they cost.

        units: (n_words, d_model). Each word's probability after every token of a few plain texts,
        over the loss of what the steered model predicts there.
        """
        model, first = self.studio.model, int(self.studio.prepend_bos)
        last = HookPoint(len(model.layers) - 1, "resid_post")
        own = [self._first_tokens(word) for word in words]
        raised, lost = torch.zeros(len(words)), torch.zeros(len(words))
        for prompt, text in zip(self.prompts[:_SCREEN_TEXTS], plain, strict=False):
            ids = self.studio.encode(prompt, chat=False)
            row = ids + text.ids[:_SCREEN_TOKENS]
            for start in range(0, len(words), _SCREEN_BLOCK):
                part = units[start : start + _SCREEN_BLOCK]
                vectors = torch.cat([torch.zeros_like(part[:1]), _FIRST_DOSE * part])
                tokens = torch.tensor([row] * len(vectors), device=model.device)
                edits = {self.dictionary.hook: vector_edit(vectors, first=first)}
                resid = model.capture(tokens, [last], edits=edits)[last][:, len(ids) - 1 :]
                before = model.unembed(resid[0]).float().log_softmax(-1)
                for i, one in enumerate(resid[1:], start):
                    after = model.unembed(one).float().softmax(-1)
                    raised[i] += float((after[:, own[i]] - before[:, own[i]].exp()).sum(-1).mean())
                    lost[i] += float(((before.exp() - after) * before).sum(-1).mean())
        scores = raised / lost.clamp_min(0.3 * _SCREEN_TEXTS)
        return scores.argsort(descending=True).tolist()

    def _first_tokens(self, word: str) -> list[int]:
        encode = self.studio.tokenizer.encode
        family = {encode(f" {other}", bos=False)[0] for other in self.families.get(word, ())}
        return sorted(family | {form[0] for form in spellings(self.studio, word)})

    def shows(self, text: str, word: str) -> bool:
        """Whether a text has the word, a form of it or one of its family."""
        return family_shows(text, word, self.families.get(word, ()))

    def measure(
        self, words: Sequence[str], moves: Tensor, seed: int, n_prompts: int | None = None
    ) -> list[dict[str, Any]]:
        """Write prompts with every word's move (n_words, d_model), and plainly."""
        prompts = list(self.prompts[:n_prompts])
        n = len(prompts)
        vectors = torch.cat([torch.zeros_like(moves[:1]), moves]).repeat_interleave(n, 0)
        rows = self.texts(vectors, seed, prompts * (1 + len(words)))
        plain = rows[:n]
        found = []
        for i, word in enumerate(words, 1):
            own = rows[i * n : (i + 1) * n]
            texts = [
                Text(prompt, a.text, b.text, self.shows(b.text, word), self.seed(seed, prompt))
                for prompt, a, b in zip(prompts, plain, own, strict=True)
            ]
            losses = [b.surprise - a.surprise for a, b in zip(plain, own, strict=True)]
            found.append(
                {
                    "word": word,
                    "share": float(np.mean([text.shows for text in texts])),
                    "plain_share": float(np.mean([self.shows(a.text, word) for a in plain])),
                    "loss": float(np.mean(losses)),
                    "texts": texts,
                }
            )
        return found

    def slider(self, unit: Tensor, prompt: str, seed: int) -> list[dict[str, Any]]:
        """Write one prompt at each of `DOSES`."""
        vectors = torch.tensor(DOSES, device=unit.device)[:, None] * unit
        rows = self.texts(vectors, seed, [prompt] * len(DOSES))
        return [
            {"dose": dose, "text": row.text, "loss": row.surprise - rows[0].surprise}
            for dose, row in zip(DOSES, rows, strict=True)
        ]


def aimed(dose: float, loss: float, usual: float) -> float:
    """Return the dose that should cost 0.75 nat, where `dose` cost `loss`; losses grow as squares.

    usual: the mean loss of all candidates; a few texts' own loss is half believed.
    """
    wanted = dose * (_AIM / max((loss + usual) / 2, 0.2)) ** 0.5
    return round(2 * min(_MOST, max(_LEAST, wanted))) / 2


def passes(row: Mapping[str, Any]) -> bool:
    """Whether a concept shows often enough, seldom enough in plain texts, and at a fair loss."""
    return (
        row["share"] >= SHOWN_SHARE
        and row["plain_share"] <= MOST_PLAIN
        and row["loss"] <= SHOWN_LOSS
    )


@dataclass
class _Search:
    """Rounds of writing, each with fewer words and a new seed."""

    writer: Writer
    words: list[str]
    units: Tensor
    tried: list[dict[str, Any]]

    def round(self, places: Sequence[int], doses: Sequence[float], seed: int, n: int | None) -> Any:
        """Write words at doses; returns their rows, the most often shown first."""
        moves = torch.tensor(doses, device=self.units.device)[:, None] * self.units[list(places)]
        rows = self.writer.measure([self.words[i] for i in places], moves, seed, n)
        rows = [
            row | {"dose": dose, "at": at}
            for row, dose, at in zip(rows, doses, places, strict=True)
        ]
        self.tried += rows
        return sorted(rows, key=lambda row: (not passes(row), -row["share"], row["loss"]))

    def again(self, rows: Sequence[Mapping[str, Any]], seed: int) -> Any:
        """Write the words of rows on all prompts, at doses aimed by what these cost."""
        usual = float(np.mean([row["loss"] for row in rows]))
        doses = [aimed(row["dose"], row["loss"], usual) for row in rows]
        return self.round([row["at"] for row in rows], doses, seed, None)


def find_showcase(
    finder: ConceptFinder,
    *,
    n: int = N_SHOWN,
    seed: int = 0,
    families: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Shown], list[dict[str, Any]]]:
    """Return up to n concepts that show, the most often first, and a row for each text set tried.

    families: the candidates, with the words that count as each. Raises UserError where no store is
    at hand, or none of its words will do as a candidate.
    """
    studio, stored = finder.studio, finder.stores[0]
    if stored is None:
        raise UserError("there is no store to find words in: name it with --store_dir")
    if families is None:
        words = candidates(studio, stored)
    else:
        words = [
            w
            for w in families
            if len(stored.find(spellings(studio, w), limit=_LEAST_ROWS)) >= _LEAST_ROWS
        ]
    if not words:
        raise UserError("the store has no fitting words: it is too small")
    writer = Writer(studio, studio.dictionaries[0], families or {})
    search = _Search(writer, words, directions(finder, words), [])
    prompts = list(TEXT_PROMPTS[:_SCREEN_TEXTS])
    plain = writer.texts(torch.zeros_like(search.units[:1]).repeat(2, 1), seed, prompts)
    order = writer.screen(words, search.units, plain)[:_N_TRIED]
    log.info("trying %s", ", ".join(words[i] for i in order))
    half = len(TEXT_PROMPTS) // 2
    first = search.round(order, [_FIRST_DOSE] * len(order), seed, half)
    second = search.again(first[:_N_AGAIN], seed + 1)
    last = search.again([row for row in second if passes(row)] or second[:1], seed + 2)
    shown = []
    for row in [row for row in last if passes(row)][:n]:
        one = Shown(
            finder.find(row["word"], use="means"),
            row["dose"],
            row["share"],
            row["plain_share"],
            row["loss"],
            list(writer.families.get(row["word"], ())),
            row["texts"],
            [],
        )
        slider = writer.slider(search.units[row["at"]], one.best.prompt, seed + 2)
        shown.append(replace(one, doses=slider))
    names = ("word", "dose", "share", "plain_share", "loss")
    return shown, [{name: row[name] for name in names} for row in search.tried]


def write_showcase(
    path: Path,
    studio: Studio,
    shown: Sequence[Shown],
    tried: Sequence[Mapping[str, Any]],
    seed: int,
) -> None:
    """Write `showcase.json`, atomically."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "made_with": fingerprints(studio)[0],
        "seed": seed,
        "n_tokens": N_TOKENS,
        "unit": "standard deviations of the residual stream along a unit direction",
        "concepts": [
            asdict(one) | {"name": one.concept.name, "concept": one.concept.to_json()}
            for one in shown
        ],
        "tried": list(tried),
    }
    write_json(path, record)


def load_showcase(path: Path, studio: Studio) -> list[Shown]:
    """Read a showcase; [] where there is none, or it was made for another SAE.

    Raises UserError when it is damaged.
    """
    if not path.exists():
        return []
    try:
        record = read_json(path)
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise UserError(f"{path}: format {record['format']} is not known here")
        if record["made_with"] != fingerprints(studio)[0]:
            log.warning("%s was made for another SAE: it is not used", path)
            return []
        return [
            Shown(
                concept_from_json(row["name"], row["concept"]),
                float(row["dose"]),
                float(row["share"]),
                float(row["plain_share"]),
                float(row["loss"]),
                list(row["family"]),
                [Text(**text) for text in row["texts"]],
                row["doses"],
            )
            for row in record["concepts"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {error!r:.80}") from None


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_studio_flags(parser)
    add_concept_flags(parser)
    parser.add_argument(
        "--families",
        type=Path,
        help='JSON of candidates and the words that count as each, {"film": {"family": ["movie"]}} '
        "[nouns of the store, and their forms]",
    )
    parser.add_argument("--n", type=positive_int, default=N_SHOWN, help="concepts [%(default)s]")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the texts [%(default)s]")
    add_overwrite_flag(parser)
    return parser


def plan_output(args: argparse.Namespace) -> Output:
    """Say what shapes the file."""
    sources = {
        "sae": file_checksum(args.sae_model_path[0])["xxh3"],
        "model": model_fingerprint(args.llama_model_dir),
    }
    if args.families is not None:
        sources["families"] = file_checksum(args.families)["xxh3"]
    return Output(
        args.sae_model_path[0].with_name(SHOWCASE),
        "showcase",
        arguments={"n": args.n, "seed": args.seed},
        sources=sources,
        single_file=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Find and write the showcase of the first SAE."""
    args = build_parser().parse_args(argv)
    started = time.monotonic()
    families = None if args.families is None else load_families(args.families)
    output = plan_output(args)
    if output.begin(overwrite=args.overwrite) is State.DONE:
        log.info("done already: %s", output.path)
        return
    studio, guides = load_studio(args)
    finder = open_finder(args, studio, guides)
    shown, tried = find_showcase(finder, n=args.n, seed=args.seed, families=families)
    write_showcase(output.path, studio, shown, tried, args.seed)
    output.finish(facts={}, counts={"n_concepts": len(shown)}, files=[SHOWCASE])
    for one in shown:
        log.info(
            "%s: in %d of %d texts at dose %g, %+.2f nats per token",
            one.concept.name, round(one.share * len(one.texts)), len(one.texts), one.dose, one.loss,
        )  # fmt: skip
    seconds = time.monotonic() - started
    log.info("%d concepts show, %.0f s: %s", len(shown), seconds, output.path, extra=FINAL)


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
