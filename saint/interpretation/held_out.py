"""Tests on held-out excerpts whose form gives nothing away: detect, fuzz and intruder.

Detection and fuzzing: arXiv:2501.08319; intruders: arXiv:2507.08473. An excerpt of which the answer
is no is given the shape of one of which it is yes: as many tokens on either side of its centre, and
marks at the same distances, on tokens of the same class (a capitalised word, a number, …).
`benchmarks/label_leaks.py` measures what is left.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from saint.evidence.labels import SET_SIZE
from saint.interpretation.prompts import (
    Prompt,
    PromptOptions,
    clean,
    marked,
    numbered,
    of_kinds,
    render,
)

_SIDE = 10  # tokens on either side of an excerpt's centre
_TRIES = 10  # excerpts that are tried for a shape
_MARKS, _LENGTH = 20.0, 0.3  # what agreeing marks are worth, and a token that is lost
_LEAST_AGREEMENT = 0.75
_LEAST = 4  # excerpts of a class, without which there is no test
Example = Mapping[str, Any]


@dataclass(frozen=True)
class Excerpt:
    """A part of a window: tokens low to high (without), with its centre and marks inside it."""

    example: Example
    low: int
    centre: int
    high: int
    marks: tuple[int, ...]

    def shown(self, options: PromptOptions, *, marks: bool) -> str:
        """Its text, with or without its marks."""
        part = slice(self.low, self.high)
        cropped = {
            "tokens": self.example["tokens"][part],
            "activations": self.example["activations"][part],
            "start": 0,
            "position": self.centre - self.low,
        }
        inside = [i - self.low for i in self.marks] if marks else ()
        return render(cropped, options, marks=inside)

    def cropped(self, before: int, after: int) -> Excerpt:
        """At most so many tokens on either side of the centre."""
        low, high = max(self.low, self.centre - before), min(self.high, self.centre + after + 1)
        inside = tuple(i for i in self.marks if low <= i < high)
        return Excerpt(self.example, low, self.centre, high, inside)


def excerpt(example: Example) -> Excerpt:
    """The part of a firing window around its strongest token, with the marks it deserves."""
    n = len(example["tokens"])
    centre = min(max(example["position"] - example["start"], 0), n - 1)
    whole = Excerpt(example, 0, centre, n, tuple(marked(example)))
    return whole.cropped(_SIDE, _SIDE)


@lru_cache(1 << 16)
def token_class(token: str) -> str:
    """What a token looks like: the case and rough length of a word, a piece of one, a number, …."""
    text = token.strip()
    if not text:
        return "space"
    if not any(c.isalnum() for c in text):
        return "punctuation"
    if text[0].isdigit():
        return "number"
    length = "long" if len(text) > 6 else "middle" if len(text) > 3 else "short"
    case = "capital" if text[0].isupper() else "word"
    return f"{case if token[0].isspace() else case + '-piece'} {length}"


def shaped_like(
    shape: Excerpt, candidates: Sequence[Example], rng: random.Random, *, with_marks: bool
) -> tuple[Excerpt, Excerpt] | None:
    """Cut an excerpt out of one of the candidates, at silent tokens, in the shape of another.

    Both are cropped to what both have on either side of their centres, and further until their
    first and last tokens look alike. Among a few candidates the place is taken where the marks'
    classes agree best and least is lost. Returns (shape, its like), None where no place fits.
    """
    own = [token_class(t) for t in shape.example["tokens"]]
    offsets = [i - shape.centre for i in shape.marks] if with_marks else [0]
    best: tuple[float, Excerpt] | None = None
    for example in rng.sample(list(candidates), min(_TRIES, len(candidates))):
        classes = [token_class(t) for t in example["tokens"]]
        silent = [
            a == 0 and c != "space" for a, c in zip(example["activations"], classes, strict=True)
        ]
        for centre in range(len(classes)):
            before = min(shape.centre - shape.low, centre)
            after = min(shape.high - shape.centre, len(classes) - centre) - 1
            places = [centre + o for o in offsets if -before <= o <= after]
            if len(places) < len(offsets) or not all(silent[i] for i in places):
                continue
            shift = shape.centre - centre
            same = [_likeness(classes[i], own[i + shift]) for i in places]
            low = _alike_end(classes, own, shift, range(centre - before, places[0] + 1))
            high = _alike_end(classes, own, shift, range(centre + after, places[-1] - 1, -1))
            agreement = sum(same) / len(same)
            if low is None or high is None or (with_marks and agreement < _LEAST_AGREEMENT):
                continue
            lost = shape.high - shape.low - (high - low + 1)
            value = _MARKS * agreement * with_marks - _LENGTH * lost + rng.random()
            if best is None or value > best[0]:
                marks = tuple(places) if with_marks else ()
                best = (value, Excerpt(example, low, centre, high + 1, marks))
    if best is None:
        return None
    like = best[1]
    return shape.cropped(like.centre - like.low, like.high - like.centre - 1), like


def _alike_end(classes: list[str], own: list[str], shift: int, ends: range) -> int | None:
    """The first of the places for an excerpt's end at which both have tokens that look alike."""
    return next((i for i in ends if _likeness(classes[i], own[i + shift])), None)


def _likeness(a: str, b: str) -> float:
    """1 for one class, a half where only the lengths differ."""
    return 1.0 if a == b else 0.5 if a.split()[0] == b.split()[0] else 0.0


def _test_examples(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Held-out firing and silent examples, none of whose sentences is in the explain split."""
    explained = {e["sentence_id"] for e in row["examples"] if e["split"] == "explain"}
    fires = [e for e in of_kinds(row, ["quantile"], "test") if e["sentence_id"] not in explained]
    silent = of_kinds(row, ["near_miss", "random"], "test")
    return fires, [e for e in silent if e["sentence_id"] not in explained]


def _rng(row: Mapping[str, Any], task: str) -> random.Random:
    return random.Random(f"saint {task} {row['latent']}")


@dataclass(frozen=True)
class Case:
    """One excerpt of a test. kind: "fires", "near_miss", "random", "right" or "wrong"."""

    excerpt: Excerpt
    truth: int
    kind: str


def detect_cases(row: Mapping[str, Any], n: int, rng: random.Random) -> list[Case]:
    """Pairs of a firing and a silent excerpt in one shape, at most n; near misses and random ones
    in equal parts where there are enough.
    """
    fires, silent = _test_examples(row)
    rng.shuffle(fires)
    pools = {k: [e for e in silent if e["kind"] == k] for k in ("near_miss", "random")}
    cases: list[Case] = []
    for example in fires[:n]:
        kinds = sorted(pools, key=lambda k: sum(c.kind == k for c in cases))
        kind = next((k for k in kinds if pools[k]), None)
        if kind is None:
            break
        pair = shaped_like(excerpt(example), pools[kind], rng, with_marks=False)
        if pair is None:
            continue
        yes, no = pair
        pools[kind] = [e for e in pools[kind] if e is not no.example]
        cases += [Case(yes, 1, "fires"), Case(no, 0, kind)]
    return cases if len(cases) >= 2 * _LEAST else []


def fuzz_cases(row: Mapping[str, Any], n: int, rng: random.Random) -> list[Case]:
    """Pairs of firing excerpts in one shape, at most n: the marks of one stand on silent tokens."""
    fires, _ = _test_examples(row)
    rng.shuffle(fires)
    cases: list[Case] = []
    while len(fires) > 1 and len(cases) < 2 * n:
        pair = shaped_like(excerpt(fires.pop()), fires, rng, with_marks=True)
        if pair is None:
            continue
        yes, no = pair
        fires = [e for e in fires if e is not no.example]
        cases += [Case(yes, 1, "right"), Case(no, 0, "wrong")]
    return cases if len(cases) >= 2 * _LEAST else []


def intruder_sets(
    row: Mapping[str, Any],
    n: int,
    rng: random.Random,
    strangers: Sequence[Mapping[str, Any]] = (),
) -> list[tuple[list[Excerpt], int]]:
    """Sets of excerpts, at most n, and the place of the odd one in each.

    The odd one, silent, has the shape of a firing one that is not in its set. strangers: rows of
    SET_SIZE other latents, each of which gives one excerpt (or the odd one's shape): no pattern is
    shared.
    """
    fires, silent = _test_examples(row)
    pools = [_test_examples(s)[0] for s in strangers] or [fires]
    rng.shuffle(silent)
    if min(map(len, pools)) < SET_SIZE or not silent:
        return []
    decks: list[list[dict[str, Any]]] = [[] for _ in pools]

    def draw(k: int) -> list[dict[str, Any]]:
        """Take k different ones; all are used equally often."""
        deck = decks[k]
        if len(deck) < SET_SIZE:
            deck[:0] = rng.sample(pools[k], len(pools[k]))
        taken: list[dict[str, Any]] = []
        for example in reversed(list(deck)):
            if len(taken) < (1 if strangers else SET_SIZE) and example not in taken:
                taken.append(example)
                deck.remove(example)
        return taken

    sets = []
    for _ in range(n):
        drawn = [e for k in range(len(pools)) for e in draw(k)]
        # The members are cropped as the odd one's model is: as if each had a like among the silent.
        pairs = [shaped_like(excerpt(e), silent, rng, with_marks=True) for e in drawn]
        found = [pair for pair in pairs if pair is not None]
        if len(found) < SET_SIZE:
            continue
        rng.shuffle(found)
        place = rng.randrange(SET_SIZE)
        excerpts = [member for member, _ in found[1:SET_SIZE]]
        excerpts.insert(place, found[0][1])
        sets.append((excerpts, place))
    return sets


def test_prompts(
    task: str,
    row: Mapping[str, Any],
    options: PromptOptions,
    *,
    label: str = "",
    strangers: Sequence[Mapping[str, Any]] = (),
) -> list[Prompt]:
    """The requests of one test of a latent, each about a few excerpts; [] where there are too few.

    task: "detect", "fuzz" or "intruder", or one of them with "_control". Each key holds the "truth"
    (1 or 0 per excerpt, or a letter per set), and the sentences that are "tested".
    """
    rng = _rng(row, task)
    if task.startswith("intruder"):
        sets = intruder_sets(row, options.n_sets, rng, strangers)
        size = max(1, options.per_request // SET_SIZE)
        return [_intruder_prompt(part, options) for part in _parts(sets, size)]
    make = detect_cases if task.startswith("detect") else fuzz_cases
    cases = make(row, options.n_test, rng)
    rng.shuffle(cases)
    prompts = []
    for part in _parts(cases, options.per_request):
        lines = [c.excerpt.shown(options, marks=task.startswith("fuzz")) for c in part]
        text = f"Label: {clean(label)}\n\nExcerpts:\n{numbered(lines)}"
        key = {
            "truth": [c.truth for c in part],
            "kinds": [c.kind for c in part],
            "tested": _sentences(c.excerpt for c in part),
            "label": label,
        }
        prompts.append(Prompt(text, key))
    return prompts


def _intruder_prompt(sets: Sequence[tuple[list[Excerpt], int]], options: PromptOptions) -> Prompt:
    texts, truth = [], []
    for number, (excerpts, place) in enumerate(sets, start=1):
        lines = [e.shown(options, marks=True) for e in excerpts]
        rows = "\n".join(f"{chr(65 + i)}. {line}" for i, line in enumerate(lines))
        texts.append(f"Set {number}:\n{rows}")
        truth.append(chr(65 + place))
    tested = _sentences(e for excerpts, _ in sets for e in excerpts)
    return Prompt("\n\n".join(texts), {"truth": truth, "tested": tested})


def _sentences(excerpts: Iterable[Excerpt]) -> list[int]:
    return sorted({e.example["sentence_id"] for e in excerpts})


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut into parts of almost equal size, none larger than `size`."""
    n = -(-len(items) // size)
    return [items[i * len(items) // n : (i + 1) * len(items) // n] for i in range(n)]
