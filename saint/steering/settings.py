"""Steering: a language model with its SAEs, and settings turned into edits of its activations.

Everything here is read-only after loading: two visitors who steer at once share the weights and
nothing else. The edit is `sae.steering_shift`; this module turns a person's settings (strength in
units of a latent's largest seen activation) into it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from saint.stage.errors import UserError

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
