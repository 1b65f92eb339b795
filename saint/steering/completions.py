"""Pairs of plain and steered completions, and what steering did to them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from llama_3 import Edit, HookPoint, Llama, Sampling, generate
from sae import standardise
from saint.steering.settings import ConceptSetting, Request, Setting, Wish
from saint.steering.studio import Dictionary, Studio, build_edits, concept_vector

_UNEMBED_ROWS = 64


@dataclass(frozen=True)
class Reading:
    """A text as the *plain* model reads it.

    tokens: display texts (BOS left out), the first n_prompt of them the prompt's. surprise: nats,
    -log p(token | what came before), None for a first token without BOS. activations: per token,
    each chosen latent's activation in its units, and each chosen concept's (1: as its own tokens).
    ids: of all tokens, BOS included.
    """

    tokens: list[str]
    n_prompt: int
    surprise: list[float | None]
    activations: list[list[float]]
    ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The generated part."""
        return "".join(self.tokens[self.n_prompt :])

    @property
    def mean_surprise(self) -> float | None:
        """Nats per generated token; its exponential is the perplexity."""
        values = [s for s in self.surprise[self.n_prompt :] if s is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Effect:
    """What one wish did, averaged over the edited tokens.

    present, target, realised: a latent's activation in its units; a concept's coordinate above an
    average token's, in standard deviations. share: length of what all wishes at this hook point
    added, relative to the activation's own. None where no token was edited.
    """

    setting: Wish
    present: float | None
    target: float | None
    realised: float | None
    share: float | None


@dataclass(frozen=True)
class Pair:
    """One prompt's two completions.

    moved: hook point ("layer 13 resid_pre") -> length of what all latents and concepts together
    added there, as a share of the activation's own, mean over the edited tokens.
    """

    prompt: str
    plain: Reading
    steered: Reading
    effects: list[Effect]
    moved: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        record: dict[str, Any] = {"prompt": self.prompt}
        for name, reading in (("plain", self.plain), ("steered", self.steered)):
            record[name] = {"text": reading.text, "mean_surprise": reading.mean_surprise}
            record[name] |= {f.name: getattr(reading, f.name) for f in fields(reading)}
        record["effects"] = [
            {f.name: getattr(effect, f.name) for f in fields(effect)}
            | {"setting": str(effect.setting)}
            for effect in self.effects
        ]
        record["moved"] = self.moved
        return record


@dataclass(frozen=True)
class Streamed:
    """Texts so far, (plain, steered) per prompt; `pairs` is there once generation has ended."""

    texts: list[tuple[str, str]]
    pairs: list[Pair] | None = None


def stream_pairs(studio: Studio, request: Request) -> Iterator[Streamed]:
    """Generate plain and steered completions side by side, with the same seed.

    Yields after every token and once more, with measurements, at the end; closing the iterator
    cancels. The two runs have the same shapes, so settings that change nothing ("add 0", "scale
    1") give the same text bit for bit. Raises UserError before any work for a bad request.
    """
    prompts = studio.encode_prompts(request)
    lengths = [len(prompt) for prompt in prompts]
    edits = request_edits(studio, request, lengths)
    runs = [_Run(studio, prompts, request, None), _Run(studio, prompts, request, edits)]
    try:
        for _ in zip_longest(*(run.steps for run in runs)):
            yield Streamed(list(zip(*(run.texts() for run in runs), strict=True)))
    finally:
        for run in runs:
            run.steps.close()
    pairs = []
    for row, prompt in enumerate(request.prompts):
        plain, steered = (
            read(studio, run.ids[row], n_prompt=len(prompts[row]), settings=request.wishes)
            for run in runs
        )
        effects, moved = measure_effects(
            studio, request, runs[1].ids[row], n_prompt=len(prompts[row])
        )
        pairs.append(Pair(prompt, plain, steered, effects, moved))
    yield Streamed([(pair.plain.text, pair.steered.text) for pair in pairs], pairs)


def complete_pairs(studio: Studio, request: Request) -> list[Pair]:
    """Return what `stream_pairs` ends with, one pair per prompt."""
    pairs: list[Pair] = []
    for progress in stream_pairs(studio, request):
        pairs = progress.pairs or pairs
    return pairs


class _Run:
    """One streamed generation over a batch of prompts."""

    def __init__(
        self,
        studio: Studio,
        prompts: list[list[int]],
        request: Request,
        edits: Mapping[HookPoint, Edit] | None,
    ) -> None:
        self.ids = [list(prompt) for prompt in prompts]
        self._tokenizer = studio.tokenizer
        self._decoders = [self._tokenizer.stream_decoder() for _ in prompts]
        self._texts = ["" for _ in prompts]
        tokens = generate_ids(studio, prompts, request, edits)
        self.steps = self._follow(tokens)

    def texts(self) -> list[str]:
        return list(self._texts)

    def _follow(self, tokens: Iterator[list[int | None]]) -> Generator[None]:
        for step in tokens:
            for row, token in enumerate(step):
                if token is not None:
                    self.ids[row].append(token)
                    piece = self._tokenizer.token_bytes(token)
                    self._texts[row] += self._decoders[row].decode(piece)
            yield


def generate_ids(
    studio: Studio,
    prompts: list[list[int]],
    request: Request,
    edits: Mapping[HookPoint, Edit] | None,
    seeds: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Return an iterator of one id per prompt and step, as `llama_3.generate`.

    seeds: one per prompt, where they are not all the request's.
    """
    return generate(
        studio.model,
        prompts,
        max_new_tokens=request.max_new_tokens,
        sampling=Sampling(request.temperature, request.top_p, tuple(seeds) or request.seed),
        stop_ids=studio.tokenizer.stop_ids,
        edits=edits,
    )


@torch.no_grad()
def read(
    studio: Studio, ids: Sequence[int], *, n_prompt: int, settings: Sequence[Wish] = ()
) -> Reading:
    """Let the plain model read one sequence, and the SAEs read the plain model.

    ids: with BOS where prompts have one. n_prompt: tokens of the prompt, BOS counted.
    """
    last = HookPoint(studio.model.args.n_layers - 1, "resid_post")
    hooks = {_dictionary(studio, wish).hook for wish in settings} | {last}
    tokens = torch.tensor([list(ids)], device=studio.model.device)
    captured = studio.model.capture(tokens, hooks)
    surprise = _surprise(studio.model, captured[last][0], tokens[0])
    columns = []
    for setting in settings:
        dictionary = _dictionary(studio, setting)
        columns.append(wish_activations(dictionary, captured[dictionary.hook][0], setting))
    rows = torch.stack(columns, 1).tolist() if columns else [[] for _ in ids]
    decoder = studio.tokenizer.stream_decoder()
    texts = [decoder.decode(studio.tokenizer.token_bytes(token)) for token in ids]
    texts[-1] += decoder.decode(b"", final=True)
    skip = 1 if studio.tokenizer.bos_id == ids[0] else 0
    surprises: list[float | None] = [None, *surprise]
    return Reading(texts[skip:], n_prompt - skip, surprises[skip:], rows[skip:], list(ids))


def _surprise(model: Llama, resid: Tensor, ids: Tensor) -> list[float]:
    """Nats of tokens 1, 2, ... given what came before; logits are made a few rows at a time."""
    values = []
    for start in range(0, len(ids) - 1, _UNEMBED_ROWS):
        logits = model.unembed(resid[start : min(start + _UNEMBED_ROWS, len(ids) - 1)])
        targets = ids[start + 1 : start + 1 + len(logits)]
        values += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    return values


def _dictionary(studio: Studio, wish: Wish) -> Dictionary:
    sae = wish.sae if isinstance(wish, Setting) else wish.concept.sae
    return studio.dictionaries[sae]


_USUAL_LENGTH = 8.0  # of a concept that does not say how far its own tokens lie from average ones


def wish_activations(dictionary: Dictionary, x: Tensor, wish: Wish) -> Tensor:
    """Return (n_tokens,): a latent's activation in its units, a concept's in its own tokens'."""
    if isinstance(wish, Setting):
        return setting_activations(dictionary, x, wish)
    return coordinates(dictionary, x, wish) / (wish.concept.length or _USUAL_LENGTH)


def coordinates(dictionary: Dictionary, x: Tensor, wish: ConceptSetting) -> Tensor:
    """Return (n_tokens,): raw x's place along a concept's direction, in standard deviations.

    0 is an average token's place; 0 at BOS.
    """
    vector = concept_vector(dictionary, wish.concept)
    values = (standardise(x)[0].float() @ vector.to(x.device) - wish.concept.base).cpu()
    if dictionary.sae.config.prepend_bos:
        values[0] = 0.0
    return values


def setting_activations(dictionary: Dictionary, x: Tensor, setting: Setting) -> Tensor:
    """Return (n_tokens,) activations, in its units, of one latent on raw x; 0 at BOS."""
    sae = dictionary.sae
    z, _, _ = sae.normalise(x)
    latent = torch.tensor([setting.latent], device=z.device)
    values = sae.latent_activations(z, latent)[:, 0].cpu() / dictionary.units[setting.latent]
    if sae.config.prepend_bos:
        values[0] = 0.0
    return values


def request_edits(
    studio: Studio,
    request: Request,
    prompt_lengths: Sequence[int],
    record: dict[HookPoint, tuple[Tensor, Tensor, Tensor]] | None = None,
) -> dict[HookPoint, Edit]:
    """Return the model edits of all that a request turns up and down, see `build_edits`."""
    return build_edits(
        studio,
        request.settings,
        concepts=request.concepts,
        where=request.where,
        prompt_lengths=prompt_lengths,
        record=record,
    )


@torch.no_grad()
def measure_effects(
    studio: Studio, request: Request, ids: Sequence[int], *, n_prompt: int
) -> tuple[list[Effect], dict[str, float]]:
    """Run the steered model over its own text and compare wish with outcome.

    Directions overlap, so encoding the edited activation again need not give the target. Returns
    one effect per wish, and `Pair.moved`.
    """
    record: dict[HookPoint, tuple[Tensor, Tensor, Tensor]] = {}
    edits = request_edits(studio, request, [n_prompt], record)
    if not edits:
        return [], {}
    tokens = torch.tensor([list(ids)], device=studio.model.device)
    studio.model.capture(tokens, set(edits), edits=edits)
    shares: dict[HookPoint, float] = {}
    for hook, (before, after, edited) in record.items():
        if bool(edited.any()):
            added = torch.linalg.vector_norm((after.float() - before.float())[edited], dim=-1)
            own = torch.linalg.vector_norm(before.float()[edited], dim=-1)
            shares[hook] = float((added / own).mean())
    effects = []
    for setting in request.wishes:
        dictionary = _dictionary(studio, setting)
        before, after, edited = (t[0] for t in record[dictionary.hook])
        if dictionary.hook not in shares:
            effects.append(Effect(setting, None, None, None, None))
            continue
        mask = edited.cpu()
        if isinstance(setting, Setting):
            present, realised = (
                setting_activations(dictionary, x, setting)[mask] for x in (before, after)
            )
            target = _target(setting, present)
        else:
            present, realised = (coordinates(dictionary, x, setting)[mask] for x in (before, after))
            target = _concept_target(setting, present)
        effects.append(
            Effect(
                setting,
                float(present.mean()),
                float(target.mean()),
                float(realised.mean()),
                shares[dictionary.hook],
            )
        )
    return effects, {f"layer {hook.layer} {hook.name}": share for hook, share in shares.items()}


def _concept_target(setting: ConceptSetting, present: Tensor) -> Tensor:
    """The wished coordinate above an average token's, per token."""
    if setting.mode == "add":
        return present + setting.dose
    return torch.full_like(present, setting.dose) if setting.mode == "set" else present.clamp_max(0)


def _target(setting: Setting, present: Tensor) -> Tensor:
    """The wished activation, in units, per token."""
    if setting.mode == "add":
        return present + setting.strength
    if setting.mode == "scale":
        return present * setting.strength
    return torch.full_like(present, setting.strength if setting.mode == "set" else 0.0)
