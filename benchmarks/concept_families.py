"""The word families by which the steering benchmark tells that a text is about a concept.

    python -m benchmarks.concept_families --dataset_dir runs/quickstart/sentences \
        --store_dir runs/quickstart/activation_outputs --candidates

Document-frequency log ratios over sentences that were never captured: log of the share of the
concept's sentences (those with its word) that hold another word, over that word's share of all
sentences. `--candidates` prints the words that characterise each concept, from which families were
chosen by eye; without it `benchmarks/data/concept_families.json` is written: family, and 40 topic
words with their log ratios, none of them in the family, for a score that does not count its words.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from saint.stage.files import write_text
from saint.stage.program import run_stage
from saint.store.activation_store import SENTENCES
from saint.store.dataset import open_dataset

PATH = Path(__file__).parent / "data" / "concept_families.json"
N_TOPIC = 40
_WORD = re.compile(r"[a-z]+")
# Chosen by eye among the candidates: the word, its forms, and words that mean the concept.
CHOSEN = {
    "film": "films movie movies directed starring comedy",
    "court": "courts judge judges lawsuit plaintiff defendant appeals",
    "war": "wars soldiers fought battle conflict battles",
    "music": "musical album songs song band jazz",
    "patient": "patients hospital treatment medical surgery doctor",
    "election": "elections vote voters candidate candidates campaign",
    "school": "schools students teacher teachers pupils classroom",
    "church": "churches catholic bishop cathedral pastor priest",
    "football": "league team club player coach soccer",
    "money": "spend cash spending funds dollars",
    "police": "officers officer arrested arrest suspect crime",
    "water": "waters river lake drinking dam flood",
    "food": "foods eat eating meal restaurant restaurants",
    "train": "trains rail railway passengers locomotive",
    "hospital": "hospitals patients patient doctors nurse ward",
    "book": "books author novel published novels writer",
    "bank": "banks banking loans deposits lending",
    "rain": "rains snow storm flooding winds weather",
    "ship": "ships cruise navy crew vessel sailing",
    "aircraft": "plane jet flight pilot aviation airplane",
    "cancer": "tumor breast chemotherapy lung cancers prostate",
    "tax": "taxes income revenue irs taxpayers taxed",
    "computer": "computers software laptop internet digital computing",
    "car": "cars driving vehicle driver vehicles drove",
    "dog": "dogs pet puppy breed canine owner",
    "river": "rivers lake stream valley flows bridge",
    "king": "kings queen prince throne royal kingdom",
    "president": "presidential vice trump obama administration presidents",
    "parliament": "mps parliaments referendum parliamentary commons lawmakers",
    "oil": "gas crude pipeline petroleum barrels energy",
    "murder": "murdered killed killing guilty murders killer",
    "prison": "prisoners inmates jail sentenced prisoner sentence",
    "army": "troops soldiers military forces commander armies",
    "economy": "economic growth market markets gdp unemployment",
    "theatre": "theater theatres broadway playwright actors audience",
    "television": "tv series broadcast episode channel episodes",
    "newspaper": "newspapers editor magazine journalist reporter reporters",
    "university": "college professor campus students student graduate",
    "space": "nasa astronauts spacecraft rocket orbit satellite",
    "climate": "warming emissions carbon temperature environmental temperatures",
    "olympic": "olympics games medal athletes champion sport",
    "language": "languages english speak spoken speakers words",
    "drug": "drugs cocaine alcohol addiction dealers heroin",
    "game": "games players player team video gaming",
    "love": "loved loves romantic romance lover",
    "brain": "brains neurons cortex spinal nervous",
    "island": "islands coast sea beach archipelago caribbean",
    "airport": "flights airports airline airlines passengers flight",
}


def documents(dataset_dir: Path, store_dir: Path | None) -> list[set[str]]:
    """Return the words of every sentence of the dataset that is not in the store."""
    captured: set[int] = set()
    for part in sorted((store_dir / SENTENCES).glob("*.parquet")) if store_dir else ():
        captured |= set(pq.read_table(part, columns=["sentence_id"]).column(0).to_pylist())
    dataset = open_dataset(dataset_dir)
    found = []
    for group in dataset.row_groups:
        for i, text in enumerate(dataset.read(group), group.first_row):
            if i not in captured and isinstance(text, str):
                found.append({word for word in _WORD.findall(text.lower()) if len(word) > 2})
    return found


def log_ratios(
    docs: Sequence[set[str]], totals: Counter[str], forms: Iterable[str]
) -> dict[str, tuple[float, int]]:
    """Return {word: (log ratio, sentences)} of words in sentences that hold one of the forms."""
    own = [doc for doc in docs if not doc.isdisjoint(forms)]
    counts = Counter(word for doc in own for word in doc)
    least = max(4, 0.004 * len(own))
    return {
        word: (
            math.log((n + 0.5) / (len(own) + 1)) - math.log((totals[word] + 1) / (len(docs) + 1)),
            n,
        )
        for word, n in counts.items()
        if n >= least and totals[word] >= 15
    }


def strongest(ratios: dict[str, tuple[float, int]], n: int, without: set[str]) -> list[str]:
    """Words by log ratio times the root of their count, which puts one-offs last."""
    order = sorted(ratios, key=lambda w: -ratios[w][0] * math.sqrt(ratios[w][1]))
    return [word for word in order if word not in without][:n]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_dir", type=Path, required=True, help="sentences")
    parser.add_argument("--store_dir", type=Path, help="captured store, whose sentences are out")
    parser.add_argument("--candidates", nargs="*", help="print candidates (of these words) only")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    docs = documents(args.dataset_dir, args.store_dir)
    totals = Counter(word for doc in docs for word in doc)
    print(f"{len(docs):,} sentences that were never captured")
    if args.candidates is not None:
        for concept in args.candidates or CHOSEN:
            ratios = log_ratios(docs, totals, {concept, concept + "s"})
            print(f"{concept}: {' '.join(strongest(ratios, 26, set()))}")
        return
    record = {}
    for concept, words in CHOSEN.items():
        family = [concept, *words.split()]
        ratios = log_ratios(docs, totals, {concept, concept + "s"})
        topic = strongest(ratios, N_TOPIC, {*family, *(word + "s" for word in family)})
        weights = {word: round(ratios[word][0], 2) for word in topic}
        record[concept] = {"family": family, "topic": weights}
    lines = [f'  "{name}": {json.dumps(entry)}' for name, entry in record.items()]
    write_text(PATH, "{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {PATH}")


if __name__ == "__main__":
    run_stage(main)
