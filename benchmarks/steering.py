"""How much a concept's tokens rise per loss of fluency: SAINT's edit against the first version's.

    python benchmarks/steering.py --llama_model_dir runs/quickstart/model \
        --sae_model_path runs/quickstart/trained_sae.pt

For each of the clearest latents of the evidence file (one content word leads at least half of its
strongest sentences), every method is turned up until the text loses 0.5 nat per token under the
plain model; there, the gain in log-probability of the latent's own word is read off. Methods:

- SAINT: x + std(x) · dose · unit · direction, everywhere but at BOS
- first version: a bias before top-k and the reconstruction in place of the activation, everywhere
- first version, BOS spared: the same, but the attention sink is left alone
- random latent: SAINT's edit with another latent, at the same loss, for the same word

The first version pays for the SAE's error before any steering. Where that alone costs more than
the limit it has no admissible dose (gain 0), so a second table grants every method its own cost at
dose 0 and allows 0.5 nat on top of it, counting gain from there too.

Contexts are the plain model's own sampled continuations, the same for all. Loss: the surprise under
the plain model of a token drawn from the steered one, minus that of one drawn from the plain one,
as an exact expectation over the vocabulary at each context, so that no sampling noise decides.
Gain: mean over contexts of the change in log p(word). Any disturbance flattens predictions and so
lifts all rare words: what the random latent gains is that share. Frequency: the change in the
word's mean probability, as a factor, which flattening hardly moves. `--check_generated` also
samples whole texts at each method's final dose.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_3 import CheckpointError, Edit
from sae import ActiveLatents, TopKSparseAutoencoder
from saint.evidence.words import MIN_LETTERS, is_content_word
from saint.stage.errors import UserError, log
from saint.stage.files import write_json
from saint.stage.program import log_arguments, progress, run_stage
from saint.steering.completions import generate_ids, read
from saint.steering.guide import Guide
from saint.steering.settings import Request, Setting
from saint.steering.studio import (
    EXAMPLE_PROMPTS,
    Studio,
    add_studio_flags,
    build_edits,
    load_studio,
)

PROMPTS = (
    *EXAMPLE_PROMPTS,
    "The weather this week will be",
    "When I was a child, my family",
    "The company said on Monday that",
    "Researchers have found a way to",
)
# Doubling finds the interval in which the loss is reached; two more doses make it narrow.
DOSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
REFINEMENTS = 2
MOST_USUAL = 1e-3  # mean probability above which a word has little room to rise
METHODS = ("SAINT", "first version", "first version, BOS spared", "random latent")


@dataclass(frozen=True)
class Clear:
    """A latent with the word that leads its strongest sentences, and that word's token ids."""

    latent: int
    word: str
    share: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """One dose (in units): its loss and gain (nats per token) and the factor on the frequency."""

    dose: float
    loss: float
    gain: float
    frequency: float


@dataclass(frozen=True)
class Outcome:
    """What a method reached. at_limit: at the allowed loss; above_zero: at that loss over its own.

    None where the loss cannot be had: dose 0 costs more already, or the strongest costs less.
    """

    method: str
    latent: int
    curve: list[Point]
    at_limit: Point | None
    above_zero: Point | None
    generated_loss: float | None = None


@dataclass(frozen=True)
class Contexts:
    """The plain model's texts and what it predicts in them.

    ids: (n_rows, length). mask: the positions that predict generated tokens. logprobs:
    (n_positions, vocab) there; entropy: (n_positions,), nats.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_studio_flags(parser)
    parser.add_argument("--n_latents", type=int, default=20, help="clear latents [20]")
    parser.add_argument("--loss", type=float, default=0.5, help="nats per token given up [0.5]")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens per context [16]")
    parser.add_argument("--seed", type=int, default=0, help="of contexts and controls [0]")
    parser.add_argument("--check_generated", action="store_true", help="also sample whole texts")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    return parser


def clear_latents(studio: Studio, guide: Guide, contexts: Contexts, n: int) -> list[Clear]:
    """Choose rare latents whose strongest sentences are led by one content word; one per word."""
    if guide.evidence is None or guide.densities is None:
        raise UserError("this benchmark needs the evidence file: --evidence_path")
    usual = contexts.logprobs.exp().mean(0)
    found = []
    for word, places in guide.token_index(studio.tokenizer).items():
        ids = _spellings(studio, word) if is_content_word(word, min_letters=MIN_LETTERS) else ()
        if not ids or float(usual[list(ids)].sum()) > MOST_USUAL:
            continue
        for latent, share in places:
            if share >= 0.5 and guide.densities[latent] < 0.01:
                found.append((-share, guide.densities[latent], Clear(latent, word, share, ids)))
    chosen: dict[str, Clear] = {}
    for _, _, clear in sorted(found, key=lambda item: item[:2]):
        chosen.setdefault(clear.word, clear)
    if len(chosen) < n:
        log.info("only %d latents are clear enough", len(chosen))
    return list(chosen.values())[:n]


def _spellings(studio: Studio, word: str) -> tuple[int, ...]:
    """Ids of the word's spellings that are one token: with and without space and capitals."""
    forms = {space + w for space in ("", " ") for w in (word, word.capitalize(), word.upper())}
    encoded = [studio.tokenizer.encode(form, bos=False) for form in sorted(forms)]
    return tuple(sorted({ids[0] for ids in encoded if len(ids) == 1}))


@torch.no_grad()
def make_contexts(studio: Studio, *, new_tokens: int, seed: int) -> Contexts:
    """Sample the plain model's continuations of PROMPTS and read its predictions there."""
    prompts = [studio.encode(prompt, chat=False) for prompt in PROMPTS]
    rows = sample(studio, prompts, None, new_tokens=new_tokens, seed=seed)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        mask[i, len(prompts[i]) - 1 : len(row) - 1] = True
    ids, mask = ids.to(studio.model.device), mask.to(studio.model.device)
    logprobs = studio.model(ids)[mask].log_softmax(-1)
    return Contexts(ids, mask, logprobs, -(logprobs.exp() * logprobs).sum(-1))


def sample(
    studio: Studio, prompts: list[list[int]], edit: Edit | None, *, new_tokens: int, seed: int
) -> list[list[int]]:
    """Sample at temperature 1, top-p 0.95; returns prompts with their continuations."""
    request = Request(
        (), max_new_tokens=new_tokens, temperature=1.0, top_p=0.95, seed=seed
    )  # fmt: skip
    edits = None if edit is None else {studio.dictionaries[0].hook: edit}
    rows = [list(prompt) for prompt in prompts]
    for step in generate_ids(studio, prompts, request, edits):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def first_version_edit(
    sae: TopKSparseAutoencoder, latent: int, bias: float, *, spare_bos: bool
) -> Edit:
    """A bias on one latent before top-k, and the reconstruction in place of the activation."""

    def edit(x: Tensor, positions: Tensor) -> Tensor:
        z, mean, scale = sae.normalise(x)
        pre = sae.pre_activations(z.reshape(-1, z.shape[-1]))
        pre[:, latent] += bias
        values, indices = pre.topk(sae.config.k, dim=1)
        kept = ActiveLatents.of_matrices(values.relu(), indices)
        rebuilt = sae.decode(kept).reshape(z.shape) * scale + mean
        first = 1 if spare_bos else 0
        return torch.where((positions >= first).unsqueeze(-1), rebuilt.to(x.dtype), x)

    return edit


def method_edit(studio: Studio, method: str, latent: int, dose: float) -> Edit:
    """The edit of a method at a dose in units of the latent's largest seen activation."""
    dictionary = studio.dictionaries[0]
    if method in ("SAINT", "random latent"):
        setting = Setting(latent, "add", dose)
        edits = build_edits(
            studio, (setting,), where="both", prompt_lengths=[1] * len(PROMPTS)
        )  # fmt: skip
        return edits[dictionary.hook]
    bias = dose * float(dictionary.units[latent])
    return first_version_edit(dictionary.sae, latent, bias, spare_bos=method.endswith("spared"))


@torch.no_grad()
def measure(
    studio: Studio, contexts: Contexts, method: str, latent: int, dose: float, ids: Sequence[int]
) -> Point:
    """Run the steered model over the contexts and compare its predictions with the plain ones."""
    edits = {studio.dictionaries[0].hook: method_edit(studio, method, latent, dose)}
    steered = studio.model(contexts.ids, edits=edits)[contexts.mask].log_softmax(-1)
    surprise = -(steered.exp() * contexts.logprobs).sum(-1)
    wanted = list(ids)
    after, before = (p[:, wanted].logsumexp(-1) for p in (steered, contexts.logprobs))
    frequency = after.exp().mean() / before.exp().mean()
    loss = (surprise - contexts.entropy).mean()
    return Point(dose, float(loss), float((after - before).mean()), float(frequency))


def crossing(curve: Sequence[Point], limit: float) -> Point | None:
    """Return the point, linear between doses, at which a curve first costs `limit`."""
    if curve[0].loss > limit:
        return None
    for low, high in zip(curve, curve[1:], strict=False):
        if high.loss > limit:
            t = (limit - low.loss) / (high.loss - low.loss)
            names = ("dose", "loss", "gain", "frequency")
            values = {n: (1 - t) * getattr(low, n) + t * getattr(high, n) for n in names}
            return Point(**values)
    return None


def follow(
    studio: Studio, contexts: Contexts, method: str, latent: int, clear: Clear, limit: float
) -> Outcome:
    """Turn one method up until it costs `limit`, and `limit` more than it costs without a dose."""

    def at(dose: float) -> Point:
        return measure(studio, contexts, method, latent, dose, clear.token_ids)

    curve = [at(0.0)]
    own = curve[0].loss + limit
    for dose in DOSES[1:]:
        if curve[-1].loss > own:
            break
        curve.append(at(dose))
    wishes = (own,) if abs(own - limit) < 1e-3 else (limit, own)
    for wish in wishes:
        for _ in range(REFINEMENTS):
            guess = crossing(curve, wish)
            if guess is not None:
                curve = sorted([*curve, at(guess.dose)], key=lambda point: point.dose)
    limit_point, own_point = crossing(curve, limit), crossing(curve, own)
    if own_point is not None:
        own_point = replace(
            own_point,
            gain=own_point.gain - curve[0].gain,
            frequency=own_point.frequency / curve[0].frequency,
        )
    return Outcome(method, latent, curve, limit_point, own_point)


def generated_loss(
    studio: Studio, outcome: Outcome, plain: float, args: argparse.Namespace
) -> float | None:
    """Loss of fluency of whole texts sampled at a method's final dose."""
    point = outcome.at_limit or outcome.above_zero
    if point is None:
        return None
    edit = method_edit(studio, outcome.method, outcome.latent, point.dose)
    return _sampled_surprise(studio, edit, args) - plain


def _sampled_surprise(studio: Studio, edit: Edit | None, args: argparse.Namespace) -> float:
    prompts = [studio.encode(prompt, chat=False) for prompt in PROMPTS]
    rows = sample(studio, prompts, edit, new_tokens=args.new_tokens, seed=args.seed + 1)
    values = []
    for prompt, row in zip(prompts, rows, strict=True):
        reading = read(studio, row, n_prompt=len(prompt))
        values += [s for s in reading.surprise[reading.n_prompt :] if s is not None]
    return statistics.fmean(values)


def run_methods(
    studio: Studio, guide: Guide, contexts: Contexts, chosen: list[Clear], args: argparse.Namespace
) -> dict[str, list[Outcome]]:
    """Follow every method for every clear latent."""
    draw = random.Random(args.seed)
    others = [i for i, d in enumerate(guide.densities or []) if 0 < d < 0.01]
    results: dict[str, list[Outcome]] = {method: [] for method in METHODS}
    plain = _sampled_surprise(studio, None, args) if args.check_generated else 0.0
    bar = progress(len(chosen) * len(METHODS), unit="curve", description="steer")
    for clear in chosen:
        for method in METHODS:
            latent = draw.choice(others) if method == "random latent" else clear.latent
            outcome = follow(studio, contexts, method, latent, clear, args.loss)
            if args.check_generated:
                lost = generated_loss(studio, outcome, plain, args)
                outcome = replace(outcome, generated_loss=lost)
            results[method].append(outcome)
            bar.update()
        log.info("%s: %s", clear.word, _line(results, "at_limit"))
    bar.close()
    return results


def _line(results: dict[str, list[Outcome]], which: str) -> str:
    points = {method: getattr(outcomes[-1], which) for method, outcomes in results.items()}
    return ", ".join(f"{m} {p.gain:.2f}" if p else f"{m} -" for m, p in points.items())


def _report(results: dict[str, list[Outcome]], chosen: list[Clear], limit: float) -> None:
    print(f"{len(chosen)} latents: {', '.join(clear.word for clear in chosen)}")
    titles = {
        "at_limit": f"at a loss of {limit} nat per token",
        "above_zero": f"at {limit} nat per token above each method's own cost at dose 0",
    }
    for which, title in titles.items():
        print(f"\nmedians {title}")
        print(f"{'method':<26}{'gain':>7}{'frequency':>11}{'dose':>7}{'admissible':>12}")
        for method, outcomes in results.items():
            print(f"{method:<26}{_medians([getattr(o, which) for o in outcomes])}")
    for method, outcomes in results.items():
        cost = statistics.median(o.curve[0].loss for o in outcomes)
        sampled = [o.generated_loss for o in outcomes if o.generated_loss is not None]
        loss = f", sampled texts at its dose {statistics.median(sampled):.2f}" if sampled else ""
        print(f"{method}: loss at dose 0 {cost:.3f}{loss}")


def _medians(points: list[Point | None]) -> str:
    """A method that has no admissible dose for a latent gains nothing there."""
    none = Point(0.0, 0.0, 0.0, 1.0)
    real = [point or none for point in points]
    gain, frequency, dose = (
        statistics.median(getattr(point, name) for point in real)
        for name in ("gain", "frequency", "dose")
    )
    return f"{gain:7.2f}{frequency:10.1f}x{dose:7.2f}{sum(p is not None for p in points):12d}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print one row per method."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    studio, guides = load_studio(args)
    if len(studio.dictionaries) > 1:
        raise UserError("this benchmark compares methods on one SAE")
    contexts = make_contexts(studio, new_tokens=args.new_tokens, seed=args.seed)
    chosen = clear_latents(studio, guides[0], contexts, args.n_latents)
    if not chosen:
        raise UserError("no latent of this SAE is led by one word")
    results = run_methods(studio, guides[0], contexts, chosen, args)
    _report(results, chosen, args.loss)
    if args.output is not None:
        record = {method: [asdict(o) for o in outcomes] for method, outcomes in results.items()}
        words = [asdict(clear) for clear in chosen]
        write_json(args.output, {"loss": args.loss, "latents": words, "methods": record})


if __name__ == "__main__":
    run_stage(main, expected=(CheckpointError,))
