"""Dose sweeps: how strongly a latent can be turned before the text falls apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import stdev
from typing import Any

from saint.stage.errors import UserError
from saint.steering.completions import generate_ids, read, request_edits
from saint.steering.settings import ConceptSetting, Request, Setting, Wish
from saint.steering.studio import Studio
from saint.steering.texts import distinct_pairs

DEFAULT_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
CONCEPT_DOSES = (0.0, 2.0, 4.0, 6.0, 8.0, 9.0, 10.0, 12.0, 14.0)
# Fluency counts as broken half a nat per token above no dose (more where the texts' own scatter
# is wider, see `DoseReport.limit`), or when the text runs in circles: a loop is *easy* to predict,
# so surprise alone would praise it.
MAX_LOSS = 0.5
MIN_DISTINCT_SHARE = 0.7
# A difference is told from noise at three standard errors.
SIGMAS = 3.0
# One prompt and one text say little; these also bound a sweep's time.
SWEEP_PROMPTS = 4
SWEEP_SEEDS = 4


@dataclass(frozen=True)
class DosePoint:
    """One strength. concept, surprise and distinct are means over the generated tokens.

    concept: the latent's activation, in units, when the *plain* model reads the text, so that it
    measures the text and not the edit. surprise: nats per token under the plain model.
    distinct: share of a completion's token pairs that are its first. sample: the first completion.
    loss, rise: mean change of surprise and concept from no dose, over texts with the same prompt
    and seed; loss_error, rise_error: their standard errors over those texts.
    """

    strength: float
    concept: float
    surprise: float
    distinct: float
    sample: str
    loss: float = 0.0
    loss_error: float = 0.0
    rise: float = 0.0
    rise_error: float = 0.0

    @property
    def shows(self) -> bool:
        """Whether the concept rises in the text by more than three standard errors."""
        return self.rise > SIGMAS * self.rise_error and self.rise > 0


@dataclass(frozen=True)
class DoseReport:
    """A sweep, weakest first. proposed: the strongest dose before fluency breaks, if any."""

    setting: Wish
    points: list[DosePoint]
    proposed: float | None

    @property
    def limit(self) -> float:
        """The loss that counts as broken: half a nat, or three standard errors where that is more.

        A loss smaller than that cannot be told from none.
        """
        return max(MAX_LOSS, SIGMAS * max((p.loss_error for p in self.points), default=0.0))

    @property
    def shows(self) -> bool:
        """Whether the concept shows in the text at the proposed dose or a weaker one."""
        return any(p.shows for p in self.points if p.strength <= (self.proposed or 0.0))

    @property
    def verdict(self) -> str:
        """The report in a sentence."""
        if self.proposed is None:
            return "even the weakest dose here breaks fluency: try smaller ones"
        if not self.shows:
            return f"does not show in the text up to {self.proposed:g}, where fluency still holds"
        return f"strongest dose before fluency breaks: {self.proposed:g}"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        known = {"setting": str(self.setting), "max_loss": self.limit, "verdict": self.verdict}
        points = [asdict(point) for point in self.points]
        return {"points": points, "proposed": self.proposed} | known


def dose_request(
    studio: Studio, request: Request, *, more: Sequence[str] = (), max_new_tokens: int = 24
) -> Request:
    """Return the request that a sweep of `request`'s latents varies, within the studio's limits.

    Prompts, where, chat and seed stay; the text is sampled, since greedy text loops by itself.
    more: prompts that join, up to four in all, where there is room for them. max_new_tokens: fewer
    where the prompts leave no room for so many. Raises UserError for a bad request.
    """
    limits, n = studio.limits, len(request.prompts)
    varied = replace(
        request, settings=(), concepts=(), max_new_tokens=1, temperature=1.0, top_p=0.95
    )
    longest = max(map(len, studio.encode_prompts(varied)))
    room = min(studio.model.args.max_seq_len, limits.tokens // n) - longest
    n_new = min(max_new_tokens, limits.new_tokens, room)
    varied = replace(varied, max_new_tokens=n_new)
    for prompt in more:
        wider = replace(varied, prompts=(*varied.prompts, prompt))
        if len(wider.prompts) <= SWEEP_PROMPTS and _fits(studio, wider):
            varied = wider
    return varied


def _fits(studio: Studio, request: Request) -> bool:
    try:
        studio.encode_prompts(request)
    except UserError:
        return False
    return True


def sweep(
    studio: Studio,
    setting: Wish,
    request: Request,
    strengths: Sequence[float] = (),
) -> Iterator[DoseReport]:
    """Yield the report so far after each strength, beginning with 0.

    setting: names the latent or concept; its mode is kept for "set" and is "add" otherwise.
    strengths: `DEFAULT_STRENGTHS` for a latent, `CONCEPT_DOSES` for a concept. Every strength
    gets the same prompts and seed. Raises UserError for a bad request.
    """
    mode = "set" if setting.mode == "set" else "add"
    points: list[DosePoint] = []
    plain: list[_Sample] = []
    plain_request = replace(request, settings=(), concepts=())
    usual = DEFAULT_STRENGTHS if isinstance(setting, Setting) else CONCEPT_DOSES
    for strength in sorted({0.0, *(strengths or usual)}):
        # "set 0" would already remove the latent: the reference is no steering at all.
        one = at_strength(setting, strength, mode)
        samples = _write(studio, request.only(one) if strength else plain_request, setting)
        plain = plain or samples
        points.append(_point(strength, samples, plain))
        report = DoseReport(replace(setting, mode=mode), list(points), None)
        yield replace(report, proposed=propose(points, report.limit))


def at_strength(wish: Wish, strength: float, mode: str = "add") -> Wish:
    """Return the same wish at another strength, or dose."""
    if isinstance(wish, ConceptSetting):
        return replace(wish, mode=mode, dose=strength)
    return replace(wish, mode=mode, strength=strength)


@dataclass(frozen=True)
class _Sample:
    """One text of a sweep as the plain model reads it."""

    text: str
    concept: float
    surprise: float | None
    distinct: float


def _write(studio: Studio, request: Request, setting: Wish) -> list[_Sample]:
    """Write every prompt with every seed, and read the texts back one by one.

    As many seeds go as one batch as the studio's limit of tokens has room for.
    """
    prompts = studio.encode_prompts(request.only(setting))
    widest = max(map(len, prompts)) + request.max_new_tokens
    n_together = max(1, min(SWEEP_SEEDS, studio.limits.tokens // (len(prompts) * widest)))
    samples = []
    for first in range(0, SWEEP_SEEDS, n_together):
        n = min(n_together, SWEEP_SEEDS - first)
        seeds = [request.seed + first + i for i in range(n) for _ in prompts]
        rows = _generate(studio, prompts * n, request, seeds)
        for i, row in enumerate(rows):
            length = len(prompts[i % len(prompts)])
            reading = read(studio, row, n_prompt=length, settings=(setting,))
            concept = [values[0] for values in reading.activations[reading.n_prompt :]]
            text = request.prompts[i % len(prompts)] + reading.text
            distinct = distinct_pairs(row[length:])
            samples.append(_Sample(text, _mean(concept), reading.mean_surprise, distinct))
    return samples


def _generate(
    studio: Studio, prompts: list[list[int]], request: Request, seeds: Sequence[int]
) -> list[list[int]]:
    """Return the prompts' ids with what was generated; a prompt's draws are its own seed's."""
    lengths = [len(prompt) for prompt in prompts]
    edits = request_edits(studio, request, lengths)
    rows = [list(prompt) for prompt in prompts]
    for step in generate_ids(studio, prompts, request, edits, seeds=seeds):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def _point(strength: float, samples: Sequence[_Sample], plain: Sequence[_Sample]) -> DosePoint:
    pairs = list(zip(samples, plain, strict=True))
    read = [(a.surprise, b.surprise) for a, b in pairs]
    losses = [a - b for a, b in read if a is not None and b is not None]  # None: an empty text
    rises = [a.concept - b.concept for a, b in pairs]
    return DosePoint(
        strength,
        _mean([sample.concept for sample in samples]),
        _mean([sample.surprise for sample in samples if sample.surprise is not None]),
        _mean([sample.distinct for sample in samples]),
        samples[0].text,
        _mean(losses),
        standard_error(losses),
        _mean(rises),
        standard_error(rises),
    )


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def propose(points: Sequence[DosePoint], limit: float = MAX_LOSS) -> float | None:
    """Return the strongest dose below the first at which fluency breaks; None if all break."""
    proposed = None
    for point in points[1:]:
        lost = point.surprise - points[0].surprise
        if lost > limit or point.distinct < MIN_DISTINCT_SHARE * points[0].distinct:
            break
        proposed = point.strength
    return proposed
