"""Pairs of plain and steered completions, and what steering did to them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from llama_3 import Edit, HookPoint, Llama, Sampling, generate
from sae import standardise
from saint.steering.settings import ConceptSetting, Request, Setting, Wish
from saint.steering.studio import Dictionary, Studio, Turn, build_edits, concept_vector

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
    """Texts so far, (plain, steered) per prompt; `pairs` is there once generation has ended.

    rows: token ids so far, all plain rows first, BOS included. n_prompts: of each row.
    """

    texts: list[tuple[str, str]]
    rows: list[list[int]]
    n_prompts: list[int]
    pairs: list[Pair] | None = None


def stream_pairs(
    studio: Studio, request: Request, earlier: tuple[Sequence[Turn], Sequence[Turn]] = ((), ())
) -> Iterator[Streamed]:
    """Generate plain and steered completions side by side, with the same seed.

    They are one batch, plain rows first, of which only the others are edited: the weights are read
    once for both. Yields after every token and once more, with measurements, at the end; closing
    the iterator cancels. Settings that change nothing ("add 0", "scale 1") give the same text bit
    for bit. earlier: of a chat, the plain and the steered turns that the prompts follow. Raises
    UserError before any work for a bad request.
    """
    prompts, n = [studio.encode_prompts(request, turns) for turns in earlier], len(request.prompts)
    lengths = [len(prompt) for side in prompts for prompt in side]
    edits = rows_from(n, request_edits(studio, request, lengths[n:]))
    run = _Run(studio, [*prompts[0], *prompts[1]], request, edits)
    try:
        for _ in run.steps:
            texts = list(zip(run.texts[:n], run.texts[n:], strict=True))
            yield Streamed(texts, run.ids, lengths)
    finally:
        run.steps.close()
    pairs = measure_pairs(studio, request, run.ids, lengths)
    texts = [(pair.plain.text, pair.steered.text) for pair in pairs]
    yield Streamed(texts, run.ids, lengths, pairs)


def measure_pairs(
    studio: Studio, request: Request, rows: Sequence[Sequence[int]], n_prompts: Sequence[int]
) -> list[Pair]:
    """Return pairs of texts that were written for a request: `Streamed.rows`, whole or not."""
    n = len(request.prompts)
    readings = read_rows(studio, rows, n_prompts, request.wishes)
    measured = measure_effects(studio, request, rows[n:], n_prompts[n:])
    return [
        Pair(prompt, plain, steered, *effects)
        for prompt, plain, steered, effects in zip(
            request.prompts, readings[:n], readings[n:], measured, strict=True
        )
    ]


def complete_pairs(studio: Studio, request: Request) -> list[Pair]:
    """Return what `stream_pairs` ends with, one pair per prompt."""
    pairs: list[Pair] = []
    for progress in stream_pairs(studio, request):
        pairs = progress.pairs or pairs
    return pairs


def rows_from(first: int, edits: Mapping[HookPoint, Edit]) -> dict[HookPoint, Edit]:
    """Return edits that leave the batch's rows before number `first` as they are."""

    def of_rest(edit: Edit) -> Edit:
        def edit_rest(x: Tensor, positions: Tensor) -> Tensor:
            return torch.cat([x[:first], edit(x[first:], positions[first:])])

        return edit_rest

    return {hook: of_rest(edit) for hook, edit in edits.items()}


class _Run:
    """A streamed generation over a batch of prompts: ids and texts so far, one per row."""

    def __init__(
        self,
        studio: Studio,
        prompts: list[list[int]],
        request: Request,
        edits: Mapping[HookPoint, Edit],
    ) -> None:
        self.ids = [list(prompt) for prompt in prompts]
        self.texts = ["" for _ in prompts]
        self._tokenizer = studio.tokenizer
        self._decoders = [self._tokenizer.stream_decoder() for _ in prompts]
        self.steps = self._follow(generate_ids(studio, prompts, request, edits))

    def _follow(self, tokens: Iterator[list[int | None]]) -> Generator[None]:
        for step in tokens:
            for row, token in enumerate(step):
                if token is not None:
                    self.ids[row].append(token)
                    piece = self._tokenizer.token_bytes(token)
                    self.texts[row] += self._decoders[row].decode(piece)
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


def read(
    studio: Studio, ids: Sequence[int], *, n_prompt: int, settings: Sequence[Wish] = ()
) -> Reading:
    """Let the plain model read one sequence, and the SAEs read the plain model.

    ids: with BOS where prompts have one. n_prompt: tokens of the prompt, BOS counted.
    """
    return read_rows(studio, [ids], [n_prompt], settings)[0]


@torch.no_grad()
def read_rows(
    studio: Studio,
    rows: Sequence[Sequence[int]],
    n_prompts: Sequence[int],
    settings: Sequence[Wish],
) -> list[Reading]:
    """As `read`, of several sequences in one pass."""
    last = HookPoint(studio.model.args.n_layers - 1, "resid_post")
    hooks = {_dictionary(studio, wish).hook for wish in settings} | {last}
    lengths = [len(row) for row in rows]
    tokens = torch.tensor([i for row in rows for i in row], device=studio.model.device)
    captured = studio.model.capture(tokens, hooks, seq_lens=lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    surprise = _surprise(studio.model, captured[last], tokens, starts)
    columns = []
    for setting in settings:
        dictionary = _dictionary(studio, setting)
        column = wish_activations(dictionary, captured[dictionary.hook], setting)
        columns.append(_silent_at_bos(column, dictionary, starts))
    activations = torch.stack(columns, 1) if columns else torch.zeros(len(tokens), 0)
    readings = []
    for ids, n_prompt, nats, its in zip(
        rows, n_prompts, surprise.split(lengths), activations.split(lengths), strict=True
    ):
        decoder = studio.tokenizer.stream_decoder()
        texts = [decoder.decode(studio.tokenizer.token_bytes(token)) for token in ids]
        texts[-1] += decoder.decode(b"", final=True)
        skip = 1 if studio.tokenizer.bos_id == ids[0] else 0
        surprises: list[float | None] = [None, *nats.tolist()[1:]]
        record = (texts[skip:], n_prompt - skip, surprises[skip:], its.tolist()[skip:], list(ids))
        readings.append(Reading(*record))
    return readings


def _surprise(model: Llama, resid: Tensor, ids: Tensor, starts: Tensor) -> Tensor:
    """Nats of packed tokens (n,) given what came before, on the CPU; 0 where a sequence starts.

    starts: (n_sequences,). Logits are made a few rows at a time.
    """
    values, continued = torch.zeros(len(ids)), torch.ones(len(ids), dtype=torch.bool)
    continued[starts] = False
    for at in continued.nonzero()[:, 0].split(_UNEMBED_ROWS):
        logits = model.unembed(resid[(at - 1).to(resid.device)])
        targets = ids[at.to(ids.device)]
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        values[at] = nats.cpu()
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


def _silent_at_bos(values: Tensor, dictionary: Dictionary, starts: Tensor) -> Tensor:
    """Put 0 where a sequence starts, if that is a BOS token, which no SAE was trained on."""
    if dictionary.sae.config.prepend_bos:
        values[starts] = 0.0
    return values


def coordinates(dictionary: Dictionary, x: Tensor, wish: ConceptSetting) -> Tensor:
    """Return (n_tokens,): raw x's place along a concept's direction, in standard deviations.

    0 is an average token's place.
    """
    vector = concept_vector(dictionary, wish.concept)
    return (standardise(x)[0].float() @ vector.to(x.device) - wish.concept.base).cpu()


def setting_activations(dictionary: Dictionary, x: Tensor, setting: Setting) -> Tensor:
    """Return (n_tokens,) activations, in its units, of one latent on raw x."""
    sae = dictionary.sae
    z, _, _ = sae.normalise(x)
    latent = torch.tensor([setting.latent], device=z.device)
    return sae.latent_activations(z, latent)[:, 0].cpu() / dictionary.units[setting.latent]


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


Measured = tuple[list[Effect], dict[str, float]]
"""One effect per wish, and `Pair.moved`."""


@torch.no_grad()
def measure_effects(
    studio: Studio, request: Request, rows: Sequence[Sequence[int]], n_prompts: Sequence[int]
) -> list[Measured]:
    """Run the steered model over its own texts, in one pass, and compare wish with outcome.

    Directions overlap, so encoding the edited activation again need not give the target.
    """
    record: dict[HookPoint, tuple[Tensor, Tensor, Tensor]] = {}
    edits = request_edits(studio, request, n_prompts, record)
    if not edits:
        return [([], {}) for _ in rows]
    lengths = [len(row) for row in rows]
    padded = [[*row, *[0] * (max(lengths) - len(row))] for row in rows]
    tokens = torch.tensor(padded, device=studio.model.device)
    layout = studio.model.layout(tokens, lengths)
    studio.model.capture(tokens, set(edits), edits=edits, layout=layout)
    return [
        _measured(
            studio,
            request,
            {hook: (b[i, :n], a[i, :n], e[i, :n]) for hook, (b, a, e) in record.items()},
        )
        for i, n in enumerate(lengths)
    ]


def _measured(
    studio: Studio, request: Request, record: Mapping[HookPoint, tuple[Tensor, Tensor, Tensor]]
) -> Measured:
    """Compare one text's activations (n, d_model) before and after, where edited (n,) says."""
    shares: dict[HookPoint, float] = {}
    for hook, (before, after, edited) in record.items():
        if bool(edited.any()):
            added = torch.linalg.vector_norm((after.float() - before.float())[edited], dim=-1)
            own = torch.linalg.vector_norm(before.float()[edited], dim=-1)
            shares[hook] = float((added / own).mean())
    effects = []
    for wish in request.wishes:
        dictionary = _dictionary(studio, wish)
        before, after, edited = record[dictionary.hook]
        if dictionary.hook not in shares:
            effects.append(Effect(wish, None, None, None, None))
            continue
        x = before[edited], after[edited]
        if isinstance(wish, Setting):
            present, realised = (setting_activations(dictionary, each, wish) for each in x)
            target = _target(wish, present)
        else:
            present, realised = (coordinates(dictionary, each, wish) for each in x)
            target = _concept_target(wish, present)
        present, target, realised = (float(t.mean()) for t in (present, target, realised))
        effects.append(Effect(wish, present, target, realised, shares[dictionary.hook]))
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
