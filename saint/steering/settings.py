"""What a person asks for: latents and concepts turned up or down, on which prompts, how written.

`896=+1.5` names a latent, its strength in units of its largest seen activation; `film=+8` names a
concept, its dose in standard deviations of the residual stream along the concept's unit direction.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from saint.stage.errors import UserError

MODES = ("add", "set", "scale", "ablate")


WHERE = ("both", "generated", "prompt")


_MAX_STRENGTH = 1000.0


_SETTING = re.compile(r"(?:(\d+):)?(\d+)=(.+)")


_CONCEPT_SETTING = re.compile(r"([^=]*[^=\d\s:][^=]*)=(.+)", re.DOTALL)


_SHORTHAND = {"+": "add", "-": "add", "*": "scale", "x": "scale"}


MAX_CONCEPT_LATENTS = 256
_MAX_NAME_CHARS = 80


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
class Concept:
    """A named direction: a few latents, and the difference of means that they stand for.

    latents, weights: Σ weights_i · decoder direction_i has length 1; weights are not negative.
    shares: each latent's part of the cosine of that sum with `means`. means: (d_model,), the unit
    difference of means, () where it is not known. length: that difference's, in standard
    deviations: as far as the query's own tokens lie from average ones, 0 where unknown. base: the
    coordinate of an average token along `vector`'s direction. explained: cosine² of the latents'
    sum with `means`. use: which of the two steers, "latents" or "means". query, source, n_tokens:
    what it was found from.
    """

    name: str
    latents: tuple[int, ...]
    weights: tuple[float, ...]
    shares: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    base: float = 0.0
    explained: float = 0.0
    use: str = "latents"
    query: str = ""
    source: str = ""
    n_tokens: int = 0
    sae: int = 0
    length: float = 0.0

    def __post_init__(self) -> None:
        numbers = (*self.weights, *self.shares, *self.means, self.base, self.explained, self.length)
        if not re.fullmatch(r"[^=\x00-\x1f]*[^=\d\s:\x00-\x1f][^=\x00-\x1f]*", self.name):
            raise UserError(f"concept {self.name!r:.40}: a name has a letter and no “=”")
        if len(self.name) > _MAX_NAME_CHARS or self.name != self.name.strip():
            raise UserError(f"concept {self.name!r:.40}: at most {_MAX_NAME_CHARS} characters")
        if len(self.weights) != len(self.latents) or len(self.latents) > MAX_CONCEPT_LATENTS:
            raise UserError(f"concept {self.name}: its latents and weights do not fit")
        if self.use not in ("latents", "means") or not (self.means or self.use == "latents"):
            raise UserError(f"concept {self.name}: use {self.use!r:.40} is not there to use")
        if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise UserError(f"concept {self.name}: a weight is not a number")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON- and YAML-ready dictionary; `means` as base64 of float16."""
        record: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("query", "source", "n_tokens", "sae", "use", "explained", "base", "length")
        }
        shares = self.shares or (0.0,) * len(self.latents)
        record["latents"] = {
            int(latent): {"weight": weight, "share": share}
            for latent, weight, share in zip(self.latents, self.weights, shares, strict=True)
        }
        if self.means:
            packed = np.array(self.means, np.float16).tobytes()
            record["means"] = base64.b64encode(packed).decode()
        return record


def concept_from_json(name: str, record: Any) -> Concept:
    """Read what `Concept.to_json` wrote. Raises UserError for what is no concept."""
    if not isinstance(record, Mapping) or not isinstance(record.get("latents"), Mapping):
        raise UserError(f"concept {name!r:.40} is not a mapping with latents")
    try:
        rows = {
            int(k): (float(v["weight"]), float(v["share"])) for k, v in record["latents"].items()
        }
        raw = base64.b64decode(str(record.get("means", "")), validate=True)
        means = tuple(np.frombuffer(raw, np.float16).astype(float).tolist())
        return Concept(
            name=str(name),
            latents=tuple(rows),
            weights=tuple(weight for weight, _ in rows.values()),
            shares=tuple(share for _, share in rows.values()),
            means=means,
            base=float(record.get("base", 0.0)),
            explained=float(record.get("explained", 0.0)),
            use=str(record.get("use", "latents")),
            query=str(record.get("query", ""))[:2000],
            source=str(record.get("source", ""))[:200],
            n_tokens=int(record.get("n_tokens", 0)),
            sae=int(record.get("sae", 0)),
            length=float(record.get("length", 0.0)),
        )
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"concept {name!r:.40} is damaged: {error}") from None


@dataclass(frozen=True)
class ConceptSetting:
    """What a person asks of one concept.

    mode "add": every edited token moves by `dose` of its standard deviations along the concept's
    unit direction; "set": its coordinate there becomes `dose` above an average token's; "ablate":
    what it has above an average token's is taken away.
    """

    concept: Concept
    mode: str = "add"
    dose: float = 8.0

    def __post_init__(self) -> None:
        if self.mode not in ("add", "set", "ablate"):
            raise UserError(f"concept mode {self.mode!r}: expected add, set or ablate")
        if not math.isfinite(self.dose) or abs(self.dose) > _MAX_STRENGTH:
            raise UserError(f"dose {self.dose} is not within ±{_MAX_STRENGTH:g}")

    def __str__(self) -> str:
        amount = {"add": f"{self.dose:+g}", "set": f"set:{self.dose:g}", "ablate": "off"}
        return f"{self.concept.name}={amount[self.mode]}"


Wish = Setting | ConceptSetting  # what is asked of a latent or of a concept


def split_steer(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tell settings of latents ("896=+1.5") from those of concepts ("film=+8")."""
    latents, concepts = [], []
    for text in texts:
        (concepts if _CONCEPT_SETTING.fullmatch(text) else latents).append(text)
    return latents, concepts


def parse_concept_setting(text: str) -> tuple[str, str, float]:
    """Read "film=+8", "film=-8" (add), "film=8" (set) or "film=off" (ablate).

    Returns name, mode and dose. Raises UserError for anything else.
    """
    match = _CONCEPT_SETTING.fullmatch(text)
    if match is None or len(text) > 2 * _MAX_NAME_CHARS:
        raise UserError(f"{text[:60]!r}: expected NAME=+8 (add), NAME=8 (set) or NAME=off (ablate)")
    name, wish = match[1].strip(), match[2].replace(" ", "")
    if wish in ("off", "ablate"):
        return name, "ablate", 0.0
    mode, colon, amount = wish.partition(":")
    if not colon:
        mode, amount = _SHORTHAND.get(wish[0], "set"), wish
    try:
        return name, mode, float(amount)
    except ValueError:
        raise UserError(f"steering setting {text!r:.60}: {amount!r} is not a number") from None


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
    concepts: travel with the request, so that it means the same wherever it is read.
    """

    prompts: tuple[str, ...]
    settings: tuple[Setting, ...] = ()
    where: str = "both"
    max_new_tokens: int = 40
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    concepts: tuple[ConceptSetting, ...] = ()

    @property
    def wishes(self) -> tuple[Wish, ...]:
        """All that is turned up or down: latents, then concepts."""
        return (*self.settings, *self.concepts)

    def only(self, wish: Wish) -> Request:
        """The same request with one wish instead of all."""
        if isinstance(wish, Setting):
            return replace(self, settings=(wish,), concepts=())
        return replace(self, settings=(), concepts=(wish,))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; settings in the terminal's notation."""
        record = asdict(replace(self, concepts=())) | {"prompts": list(self.prompts)}
        record["steer"] = [str(wish) for wish in self.wishes]
        del record["settings"]
        concepts = {s.concept.name: s.concept.to_json() for s in self.concepts}
        record["concepts"] = json.loads(json.dumps(concepts))  # keys of JSON are texts
        return record


def request_from_json(record: Any, find: Callable[[str], ConceptSetting] | None = None) -> Request:
    """Read what `Request.to_json` wrote, or a record that has it as "request" (the page's JSON).

    find: turns "film=+8" into a setting where the record does not say what the concept is.
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
    latents, wishes = split_steer(steer)
    known_concepts = record.get("concepts", {})
    if not isinstance(known_concepts, Mapping):
        raise UserError("concepts is not a mapping of names to concepts")
    return Request(
        prompts=tuple(prompts),
        settings=tuple(parse_setting(text) for text in latents),
        concepts=tuple(_read_concept_setting(text, known_concepts, find) for text in wishes),
        **values,
    )


def _read_concept_setting(
    text: str, known: Mapping[str, Any], find: Callable[[str], ConceptSetting] | None
) -> ConceptSetting:
    name, mode, dose = parse_concept_setting(text)
    if name not in known and find is not None:
        return find(text)
    if name not in known:
        raise UserError(f"the settings name the concept {name!r:.40}, and do not say what it is")
    return ConceptSetting(concept_from_json(name, known[name]), mode, dose)


def _as(kind: type, value: Any, name: str) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is not str and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and kind(value) == value:
            return kind(value)
    raise UserError(f"{name} {value!r:.40} is not a {'text' if kind is str else kind.__name__}")
