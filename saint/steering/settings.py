"""Steering: a language model with its SAEs, and settings turned into edits of its activations.

Everything here is read-only after loading: two visitors who steer at once share the weights and
nothing else. The edit is `sae.steering_shift`; this module turns a person's settings (strength in
units of a latent's largest seen activation) into it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from llama_3 import Edit, HookPoint, Llama, Tokenizer
from sae import Steer, TopKSparseAutoencoder, steering_shift
from saint.stage.program import UserError

MODES = ("add", "set", "scale", "ablate")
WHERE = ("both", "generated", "prompt")
_MAX_STRENGTH = 1000.0
_SETTING = re.compile(r"(?:(\d+):)?(\d+)=(.+)")
_SHORTHAND = {"+": "add", "-": "add", "*": "scale", "x": "scale"}


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
    """What one request may ask for.

    tokens: number of prompts times (tokens of the longest one + new tokens), which is what the
    caches grow with: the default holds a 3B model and one large SAE within 10 GB.
    """

    prompts: int = 8
    prompt_chars: int = 4000
    new_tokens: int = 256
    settings: int = 32
    tokens: int = 2560


# For one's own terminal: the model's context and the memory there is are bounds enough.
UNLIMITED = Limits(*[sys.maxsize] * len(fields(Limits)))


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
    """Read what `Request.to_json` wrote, or a record that has it as "request" (the page's JSON).

    Absent fields take their defaults. Raises UserError, naming the field, for one that there is not
    and for values of the wrong kind.
    """
    if isinstance(record, Mapping):
        record = record.get("request", record)
    if not isinstance(record, Mapping):
        raise UserError("the settings are not a JSON object")
    known = Request(()).to_json()
    for name in record:
        if name not in known:
            raise UserError(f"unknown setting {name!r:.40}; there are {', '.join(known)}")
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

    def encode_prompts(self, request: Request) -> list[list[int]]:
        """Check a request and return its prompts' token ids.

        Raises UserError, before any work, for what this studio cannot or will not do.
        """
        self.check(request)
        prompts = [self.encode(prompt, chat=request.chat) for prompt in request.prompts]
        longest, context = max(map(len, prompts)), self.model.args.max_seq_len
        length = longest + request.max_new_tokens
        if length > context:
            raise UserError(
                f"{longest} prompt tokens and {request.max_new_tokens} new ones exceed the model's "
                f"context of {context} tokens"
            )
        if length * len(prompts) > self.limits.tokens:
            raise UserError(
                f"{len(prompts)} prompts with room for {length} tokens each, new ones included, "
                f"are {length * len(prompts)} tokens: at most {self.limits.tokens} at a time "
                "(whoever starts the page can raise --max_total_tokens)"
            )
        return prompts

    def check(self, request: Request) -> None:
        """Raise UserError for what is wrong with a request whatever its prompts' tokens are."""
        limits = self.limits
        counted = (
            (len(request.prompts), limits.prompts, "prompts"),
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
        """Raise UserError for too many latents, one that is not there, or one named twice."""
        if len(settings) > self.limits.settings:
            raise UserError(
                f"{len(settings)} steered latents: at most {self.limits.settings} at a time"
            )
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
