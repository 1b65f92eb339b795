"""Steering: a language model with its SAEs, and pairs of plain and steered completions.

Everything here is read-only after loading: two visitors who steer at once share the weights and
nothing else. The edit is `sae.steering_shift`; this module turns a person's settings (strength in
units of a latent's largest seen activation) into it, generates, and measures what came of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from llama_3 import Edit, HookPoint, Llama, Sampling, Tokenizer, generate
from sae import Steer, TopKSparseAutoencoder, standardise, steering_shift
from saint.runtime import UserError

MODES = ("add", "set", "scale", "ablate")
WHERE = ("both", "generated", "prompt")
_MAX_STRENGTH = 1000.0
_SETTING = re.compile(r"(?:(\d+):)?(\d+)=(.+)")
_SHORTHAND = {"+": "add", "-": "add", "*": "scale", "x": "scale"}
_UNEMBED_ROWS = 64


@dataclass(frozen=True)
class Setting:
    """What a person asks of one latent.

    mode "add": raise its activation by `strength` units on every edited token; "set": bring it to
    `strength` units; "scale": multiply it by `strength`; "ablate": bring it to 0. A unit is the
    latent's largest seen activation. sae: which SAE, 0-based, in the order they were loaded.
    """

    latent: int
    mode: str = "add"
    strength: float = 1.0
    sae: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"steering mode {self.mode!r}: expected one of {', '.join(MODES)}")
        if not math.isfinite(self.strength) or abs(self.strength) > _MAX_STRENGTH:
            raise UserError(f"strength {self.strength} is not within ±{_MAX_STRENGTH:g}")

    def __str__(self) -> str:
        amount = "" if self.mode == "ablate" else f":{self.strength!r}"
        return f"{self.sae}:{self.latent}={self.mode}{amount}"


def parse_setting(text: str) -> Setting:
    """Read "896=+1.5" and "896=-1.5" (add), "=1.5" (set), "=*2" (scale), "=off" (ablate).

    "mode:strength" ("896=set:-1") works too, and "1:896=+1.5" names the second SAE. Inverse of
    `str(setting)`. Raises UserError for anything else.
    """
    match = _SETTING.fullmatch(text.replace(" ", ""))
    if match is None or len(text) > 60:
        raise UserError(
            f"steering setting {text[:60]!r}: expected LATENT=+1.5 (add), =1.5 (set), "
            "=*2 (scale) or =off (ablate)"
        )
    sae, latent, wish = int(match[1] or 0), int(match[2]), match[3]
    if wish in ("off", "ablate"):
        return Setting(latent, "ablate", 0.0, sae)
    mode, colon, amount = wish.partition(":")
    if not colon:
        mode, amount = _SHORTHAND.get(wish[0], "set"), wish.lstrip("*x")
    try:
        return Setting(latent, mode, float(amount), sae)
    except ValueError as error:
        reason = str(error) if isinstance(error, UserError) else f"{amount!r} is not a number"
        raise UserError(f"steering setting {text!r}: {reason}") from None


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    prompts: int = 8
    prompt_chars: int = 4000
    new_tokens: int = 256
    settings: int = 32


@dataclass(frozen=True)
class Request:
    """Everything that decides a pair of completions; as JSON it reproduces exactly the same pair.

    where: "prompt", "generated" or "both" tokens are edited. temperature 0 takes the likeliest
    token; top_p in (0, 1]. chat: each prompt is a user's message and the model answers.
    """

    prompts: tuple[str, ...]
    settings: tuple[Setting, ...] = ()
    where: str = "both"
    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; settings in the terminal's notation."""
        record = asdict(self) | {"prompts": list(self.prompts)}
        record["steer"] = [str(setting) for setting in self.settings]
        del record["settings"]
        return record


def request_from_json(record: Any) -> Request:
    """Read what `Request.to_json` wrote; absent fields take their defaults, others are ignored.

    Raises UserError, naming the field, for values of the wrong kind.
    """
    if not isinstance(record, Mapping):
        raise UserError("the settings are not a JSON object")
    kinds = {"where": str, "max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
    values: dict[str, Any] = {"chat": record.get("chat", False) is True}
    for name, kind in kinds.items():
        if name in record:
            values[name] = _as(kind, record[name], name)
    prompts = record.get("prompts", [])
    steer = record.get("steer", [])
    for name, value in (("prompts", prompts), ("steer", steer)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{name} is not a list of texts")
    return Request(
        prompts=tuple(prompts), settings=tuple(parse_setting(s) for s in steer), **values
    )


def _as(kind: type, value: Any, name: str) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is not str and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and kind(value) == value:
            return kind(value)
    raise UserError(f"{name} {value!r:.40} is not a {'text' if kind is str else kind.__name__}")


@dataclass(frozen=True)
class Dictionary:
    """A loaded SAE and its steering units.

    units: (n_latents,) float32 on the CPU, each latent's largest seen activation; 1 where it was
    never seen firing. unit_source says where they come from.
    """

    name: str
    sae: TopKSparseAutoencoder
    hook: HookPoint
    units: Tensor
    unit_source: str

    def steer(self, setting: Setting) -> Steer:
        """Turn a setting's units into the SAE's activation scale."""
        unit = float(self.units[setting.latent]) if setting.mode in ("add", "set") else 1.0
        return Steer(setting.latent, setting.mode, setting.strength * unit)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Studio:
    """The model, its tokenizer and one or more SAEs; shared by all visitors, never changed."""

    model: Llama
    tokenizer: Tokenizer
    dictionaries: tuple[Dictionary, ...]
    limits: Limits = field(default_factory=Limits)

    @property
    def prepend_bos(self) -> bool:
        """Whether prompts start with a BOS token, as the SAEs' captures did."""
        return self.dictionaries[0].sae.config.prepend_bos

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt as the model reads it.

        Raises UserError for an empty prompt, or for chat with a model that has no chat format.
        """
        if chat:
            if not self.tokenizer.has_chat:
                raise UserError("this model has no chat format: it can only continue text")
            return self.tokenizer.format_chat([{"role": "user", "content": prompt}])
        ids = self.tokenizer.encode(prompt, bos=self.prepend_bos)
        if len(ids) <= self.prepend_bos:
            raise UserError("a prompt is empty: write some text for the model to continue")
        return ids

    def check(self, request: Request) -> None:
        """Raise UserError for what this studio cannot or will not do."""
        limits = self.limits
        counted = (
            (len(request.prompts), limits.prompts, "prompts"),
            (len(request.settings), limits.settings, "steered latents"),
            (request.max_new_tokens, limits.new_tokens, "new tokens"),
            (max(map(len, request.prompts), default=0), limits.prompt_chars, "characters a prompt"),
        )
        for number, most, what in counted:
            if number > most:
                raise UserError(f"{number} {what}: at most {most} at a time")
        if not request.prompts:
            raise UserError("write a prompt first")
        if request.max_new_tokens < 1:
            raise UserError("the number of new tokens is not at least 1")
        if request.where not in WHERE:
            raise UserError(f"where {request.where!r:.40}: expected one of {', '.join(WHERE)}")
        if not 0 <= request.temperature <= 10 or not 0 < request.top_p <= 1:
            raise UserError("temperature is not in 0 to 10, or top-p not above 0 and at most 1")
        if not 0 <= request.seed < 2**63:
            raise UserError(f"seed {request.seed} is not between 0 and 2^63 - 1")
        self.check_settings(request.settings)

    def check_settings(self, settings: Sequence[Setting]) -> None:
        """Raise UserError for an SAE or latent that is not there, or a latent named twice."""
        for setting in settings:
            if not 0 <= setting.sae < len(self.dictionaries):
                raise UserError(
                    f"SAE {setting.sae}: {len(self.dictionaries)} loaded, counted from 0"
                )
            n_latents = self.dictionaries[setting.sae].sae.config.n_latents
            if not 0 <= setting.latent < n_latents:
                raise UserError(f"latent {setting.latent}: this SAE has 0 to {n_latents - 1}")
        if len({(s.sae, s.latent) for s in settings}) < len(settings):
            raise UserError("a latent is set twice: give each one setting")


def build_edits(
    studio: Studio,
    settings: Sequence[Setting],
    *,
    where: str,
    prompt_lengths: Sequence[int],
    record: dict[HookPoint, tuple[Tensor, Tensor, Tensor]] | None = None,
) -> dict[HookPoint, Edit]:
    """Return the model edits for these settings; empty when there is nothing to steer.

    where: tokens to edit; a prompt of length n has positions 0 to n - 1, the rest is "generated".
    prompt_lengths: one per row of the batch, in tokens. Position 0 is never edited where the SAE
    was trained with a BOS token. SAEs at one hook point all read x before any of them adds to it.
    record: filled with (x before, x after, edited positions) of the last forward pass per hook.
    """
    by_hook: dict[HookPoint, dict[int, list[Steer]]] = {}
    for setting in settings:
        dictionary = studio.dictionaries[setting.sae]
        steers = by_hook.setdefault(dictionary.hook, {}).setdefault(setting.sae, [])
        steers.append(dictionary.steer(setting))
    ends = torch.tensor(prompt_lengths, device=studio.model.device).unsqueeze(1)
    first = 1 if studio.prepend_bos else 0

    def make_edit(hook: HookPoint, wishes: dict[int, list[Steer]]) -> Edit:
        def edit(x: Tensor, positions: Tensor) -> Tensor:
            edited = positions >= first
            if where != "both":
                edited = edited & ((positions < ends) == (where == "prompt"))
            shift = torch.zeros_like(x, dtype=torch.float32)
            for index, steers in wishes.items():
                shift += steering_shift(studio.dictionaries[index].sae, steers, x)
            after = torch.where(edited.unsqueeze(-1), (x.float() + shift).to(x.dtype), x)
            if record is not None:
                record[hook] = (x, after, edited)
            return after

        return edit

    return {hook: make_edit(hook, wishes) for hook, wishes in by_hook.items()}


@dataclass(frozen=True)
class Reading:
    """A text as the *plain* model reads it.

    tokens: display texts (BOS left out), the first n_prompt of them the prompt's. surprise: nats,
    -log p(token | what came before), None for a first token without BOS. activations: per token,
    each chosen latent's activation in its units.
    """

    tokens: list[str]
    n_prompt: int
    surprise: list[float | None]
    activations: list[list[float]]

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
    """What one setting did, averaged over the edited tokens; activations in the latent's units.

    share: length of what all settings at this hook point added, relative to the activation's own.
    None where no token was edited.
    """

    setting: Setting
    present: float | None
    target: float | None
    realised: float | None
    share: float | None


@dataclass(frozen=True)
class Pair:
    """One prompt's two completions."""

    prompt: str
    plain: Reading
    steered: Reading
    effects: list[Effect]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        record: dict[str, Any] = {"prompt": self.prompt}
        for name, reading in (("plain", self.plain), ("steered", self.steered)):
            record[name] = {"text": reading.text, "mean_surprise": reading.mean_surprise}
            record[name] |= {f.name: getattr(reading, f.name) for f in fields(reading)}
        record["effects"] = [asdict(e) | {"setting": str(e.setting)} for e in self.effects]
        return record


@dataclass(frozen=True)
class Progress:
    """Texts so far, (plain, steered) per prompt; `pairs` is there once generation has ended."""

    texts: list[tuple[str, str]]
    pairs: list[Pair] | None = None


def stream_pairs(studio: Studio, request: Request) -> Iterator[Progress]:
    """Generate plain and steered completions side by side, with the same seed.

    Yields after every token and once more, with measurements, at the end; closing the iterator
    cancels. The two runs have the same shapes, so settings that change nothing ("add 0", "scale
    1") give the same text bit for bit. Raises UserError before any work for a bad request.
    """
    studio.check(request)
    prompts = [studio.encode(prompt, chat=request.chat) for prompt in request.prompts]
    edits = build_edits(
        studio, request.settings, where=request.where, prompt_lengths=[len(p) for p in prompts]
    )
    runs = [_Run(studio, prompts, request, None), _Run(studio, prompts, request, edits)]
    try:
        for _ in zip_longest(*(run.steps for run in runs)):
            yield Progress(list(zip(*(run.texts() for run in runs), strict=True)))
    finally:
        for run in runs:
            run.steps.close()
    pairs = []
    for row, prompt in enumerate(request.prompts):
        plain, steered = (
            read(studio, run.ids[row], n_prompt=len(prompts[row]), settings=request.settings)
            for run in runs
        )
        effects = measure_effects(studio, request, runs[1].ids[row], n_prompt=len(prompts[row]))
        pairs.append(Pair(prompt, plain, steered, effects))
    yield Progress([(pair.plain.text, pair.steered.text) for pair in pairs], pairs)


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
) -> Iterator[list[int | None]]:
    """Return an iterator of one id per prompt and step, as `llama_3.generate`.

    Raises UserError, before the first step, for a request past the model's context.
    """
    longest, context = max(map(len, prompts)), studio.model.args.max_seq_len
    if longest + request.max_new_tokens > context:
        raise UserError(
            f"{longest} prompt tokens and {request.max_new_tokens} new ones exceed the model's "
            f"context of {context} tokens"
        )
    return generate(
        studio.model,
        prompts,
        max_new_tokens=request.max_new_tokens,
        sampling=Sampling(request.temperature, request.top_p, request.seed),
        stop_ids=studio.tokenizer.stop_ids,
        edits=edits,
    )


@torch.no_grad()
def read(
    studio: Studio, ids: Sequence[int], *, n_prompt: int, settings: Sequence[Setting] = ()
) -> Reading:
    """Let the plain model read one sequence, and the SAEs read the plain model.

    ids: with BOS where prompts have one. n_prompt: tokens of the prompt, BOS counted.
    """
    last = HookPoint(studio.model.args.n_layers - 1, "resid_post")
    hooks = {studio.dictionaries[s.sae].hook for s in settings} | {last}
    tokens = torch.tensor([list(ids)], device=studio.model.device)
    captured = studio.model.capture(tokens, hooks)
    surprise = _surprise(studio.model, captured[last][0], tokens[0])
    columns = []
    for setting in settings:
        dictionary = studio.dictionaries[setting.sae]
        columns.append(setting_activations(dictionary, captured[dictionary.hook][0], setting))
    rows = torch.stack(columns, 1).tolist() if columns else [[] for _ in ids]
    decoder = studio.tokenizer.stream_decoder()
    texts = [decoder.decode(studio.tokenizer.token_bytes(token)) for token in ids]
    texts[-1] += decoder.decode(b"", final=True)
    skip = 1 if studio.tokenizer.bos_id == ids[0] else 0
    return Reading(texts[skip:], n_prompt - skip, [None, *surprise][skip:], rows[skip:])


def _surprise(model: Llama, resid: Tensor, ids: Tensor) -> list[float]:
    """Nats of tokens 1, 2, ... given what came before; logits are made a few rows at a time."""
    values = []
    for start in range(0, len(ids) - 1, _UNEMBED_ROWS):
        logits = model.unembed(resid[start : min(start + _UNEMBED_ROWS, len(ids) - 1)])
        targets = ids[start + 1 : start + 1 + len(logits)]
        values += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    return values


def setting_activations(dictionary: Dictionary, x: Tensor, setting: Setting) -> Tensor:
    """Return (n_tokens,) activations, in its units, of one latent on raw x; 0 at BOS."""
    sae = dictionary.sae
    z, _, _ = standardise(x, sae.config.norm_eps)
    latent = torch.tensor([setting.latent], device=z.device)
    values = sae.latent_activations(z, latent)[:, 0].cpu() / dictionary.units[setting.latent]
    if sae.config.prepend_bos:
        values[0] = 0.0
    return values


@torch.no_grad()
def measure_effects(
    studio: Studio, request: Request, ids: Sequence[int], *, n_prompt: int
) -> list[Effect]:
    """Run the steered model over its own text and compare wish with outcome.

    Directions overlap, so encoding the edited activation again need not give the target.
    """
    record: dict[HookPoint, tuple[Tensor, Tensor, Tensor]] = {}
    edits = build_edits(
        studio, request.settings, where=request.where, prompt_lengths=[n_prompt], record=record
    )
    if not edits:
        return []
    tokens = torch.tensor([list(ids)], device=studio.model.device)
    studio.model.capture(tokens, set(edits), edits=edits)
    effects = []
    for setting in request.settings:
        dictionary = studio.dictionaries[setting.sae]
        before, after, edited = (t[0] for t in record[dictionary.hook])
        if not bool(edited.any()):
            effects.append(Effect(setting, None, None, None, None))
            continue
        mask = edited.cpu()
        present = setting_activations(dictionary, before, setting)[mask]
        realised = setting_activations(dictionary, after, setting)[mask]
        added = torch.linalg.vector_norm((after.float() - before.float())[edited], dim=-1)
        share = (added / torch.linalg.vector_norm(before.float()[edited], dim=-1)).mean()
        effects.append(
            Effect(
                setting,
                float(present.mean()),
                float(_target(setting, present).mean()),
                float(realised.mean()),
                float(share),
            )
        )
    return effects


def _target(setting: Setting, present: Tensor) -> Tensor:
    """The wished activation, in units, per token."""
    if setting.mode == "add":
        return present + setting.strength
    if setting.mode == "scale":
        return present * setting.strength
    return torch.full_like(present, setting.strength if setting.mode == "set" else 0.0)
