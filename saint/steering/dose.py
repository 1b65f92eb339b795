"""Dose sweeps: how strongly a latent can be turned before the text falls apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from saint.stage.errors import UserError
from saint.steering.completions import generate_ids, read
from saint.steering.settings import Request, Setting
from saint.steering.studio import Studio, build_edits
from saint.steering.texts import distinct_pairs

DEFAULT_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
# Fluency counts as broken half a nat per token above no dose, or when the text runs in circles:
# a loop is *easy* to predict, so surprise alone would praise it.
MAX_LOSS = 0.5
MIN_DISTINCT_SHARE = 0.7
# One prompt says little; these also bound a sweep's time.
SWEEP_PROMPTS = 4


@dataclass(frozen=True)
class DosePoint:
    """One strength. concept, surprise and distinct are means over the generated tokens.

    concept: the latent's activation, in units, when the *plain* model reads the text, so that it
    measures the text and not the edit. surprise: nats per token under the plain model.
    distinct: share of a completion's token pairs that are its first. sample: the first completion.
    """

    strength: float
    concept: float
    surprise: float
    distinct: float
    sample: str


@dataclass(frozen=True)
class DoseReport:
    """A sweep, weakest first. proposed: the strongest dose before fluency breaks, if any."""

    setting: Setting
    points: list[DosePoint]
    proposed: float | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self) | {"setting": str(self.setting), "max_loss": MAX_LOSS}


def dose_request(
    studio: Studio, request: Request, *, more: Sequence[str] = (), max_new_tokens: int = 24
) -> Request:
    """Return the request that a sweep of `request`'s latents varies, within the studio's limits.

    Prompts, where, chat and seed stay; the text is sampled, since greedy text loops by itself.
    more: prompts that join, up to four in all, where there is room for them. max_new_tokens: fewer
    where the prompts leave no room for so many. Raises UserError for a bad request.
    """
    limits, n = studio.limits, len(request.prompts)
    varied = replace(request, settings=(), max_new_tokens=1, temperature=1.0, top_p=0.95)
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
    setting: Setting,
    request: Request,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
) -> Iterator[DoseReport]:
    """Yield the report so far after each strength, beginning with 0.

    setting: names the latent; its mode is kept for "set" and is "add" otherwise. Every strength
    gets the same prompts and seed. Raises UserError for a bad request.
    """
    mode = "set" if setting.mode == "set" else "add"
    points: list[DosePoint] = []
    for strength in sorted({0.0, *strengths}):
        # "set 0" would already remove the latent: the reference is no steering at all.
        settings = (replace(setting, mode=mode, strength=strength),) if strength else ()
        points.append(_measure(studio, replace(request, settings=settings), setting, strength))
        yield DoseReport(replace(setting, mode=mode), list(points), propose(points))


def _measure(studio: Studio, request: Request, setting: Setting, strength: float) -> DosePoint:
    prompts = studio.encode_prompts(replace(request, settings=(setting,)))
    lengths = [len(prompt) for prompt in prompts]
    edits = build_edits(studio, request.settings, where=request.where, prompt_lengths=lengths)
    rows = [list(prompt) for prompt in prompts]
    for step in generate_ids(studio, prompts, request, edits):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    concept, surprise, distinct, sample = [], [], [], ""
    for i, row in enumerate(rows):
        if len(row) == lengths[i]:
            continue
        reading = read(studio, row, n_prompt=lengths[i], settings=(setting,))
        concept += [values[0] for values in reading.activations[reading.n_prompt :]]
        surprise += [s for s in reading.surprise[reading.n_prompt :] if s is not None]
        distinct.append(distinct_pairs(row[lengths[i] :]))
        sample = sample or request.prompts[i] + reading.text
    return DosePoint(strength, _mean(concept), _mean(surprise), _mean(distinct), sample)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def propose(points: Sequence[DosePoint]) -> float | None:
    """Return the strongest dose below the first at which fluency breaks; None if all break."""
    proposed = None
    for point in points[1:]:
        lost = point.surprise - points[0].surprise
        if lost > MAX_LOSS or point.distinct < MIN_DISTINCT_SHARE * points[0].distinct:
            break
        proposed = point.strength
    return proposed
