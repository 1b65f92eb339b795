"""What shapes a trained SAE: each field once, from which flags, resolution and docs come."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from sae import NORMALISATIONS
from saint.stage.errors import UserError
from saint.stage.flags import (
    fraction,
    non_negative_float,
    positive_float,
    positive_int,
    proper_fraction,
    seed_number,
    whole_number,
)
from saint.stage.workers import Workers
from saint.store.shuffled_rows import BatchedRows
from saint.training.moments import MOMENT_KINDS
from saint.training.objectives import OBJECTIVES

LEARNING_RATE_CONSTANT = 0.77  # 4e-3 at 576 dimensions and 4,096 latents
BASES = ("none", "pca")
_DEAD_TOKENS = 10_000_000
_VALUE = "the default"  # shown as it is
_NEVER = object()  # no value equals it


@dataclass(frozen=True)
class _Given:
    """What automatic values are made of: the fields before them, and facts of the rows."""

    values: Mapping[str, Any]
    batch_size: int
    n_rows: int
    d_model: int


@dataclass(frozen=True)
class Flag:
    """How a field is asked for.

    shown: its default in words, where a value would not say it. automatic: makes the value where
    the flag is not given. before: the value of runs from before the field existed, whose manifests
    do not name it.
    """

    text: str
    kind: Callable[[str], Any]
    group: str = "recipe"
    shown: str = _VALUE
    automatic: Callable[[_Given], Any] | None = None
    choices: tuple[str, ...] | None = None
    before: Any = _NEVER


def _field(text: str, kind: Callable[[str], Any], default: Any = MISSING, **how: Any) -> Any:
    """Declare a field of `Recipe`: its flag, and the default unless that is automatic."""
    return field(default=default, metadata={"flag": Flag(text, kind, **how)})


def _on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text} is neither on nor off")
    return text == "on"


def _k_start(given: _Given) -> int:
    k, n_latents = given.values["k"], given.values["n_latents"]
    return min(n_latents, 4 * k) if given.values["k_anneal_steps"] else k


def _learning_rate(given: _Given) -> float:
    """Return the rate; times √d_model it is the share of a unit row's norm that a step moves."""
    return LEARNING_RATE_CONSTANT / (given.d_model**0.5 * given.values["n_latents"] ** 0.25)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that shapes the result, automatic values resolved."""

    n_latents: int = _field("latents of the dictionary", positive_int, 65536, group="autoencoder")
    k: int = _field("active latents per token", positive_int, 64, group="autoencoder")
    objective: str = _field(
        "which latents are active: each token's k largest, or k per token of the whole batch; "
        "matryoshka: the latter, of nested dictionaries; jumprelu: what exceeds a threshold that "
        "each latent learns",
        str,
        "batchtopk",
        choices=tuple(OBJECTIVES),
        before="topk",
    )
    bandwidth: float = _field(
        "of jumprelu: width around a threshold in which it learns, in pre-activations",
        positive_float,
        0.5,
        before=0.5,
    )
    l0_coefficient: float = _field(
        "of jumprelu: weight of (L0 / k − 1)² in the loss", positive_float, 2.0, before=2.0
    )
    threshold_rate: float = _field(
        "of jumprelu: rate of the thresholds as a multiple of learning_rate",
        positive_float,
        8.0,
        before=8.0,
    )
    num_epochs: int = _field("passes over the training rows", positive_int, 10)
    batch_size: int = _field(
        "tokens a step, over all ranks",
        positive_int,
        shown="as preprocessing says",
        automatic=lambda given: given.batch_size,
    )
    learning_rate: float = _field(
        "peak rate of Adam",
        positive_float,
        shown=f"{LEARNING_RATE_CONSTANT} / (√d_model · ∜n_latents)",
        automatic=_learning_rate,
    )
    warmup_fraction: float = _field("share of steps over which the rate rises", fraction, 0.02)
    decay_fraction: float = _field(
        "share of steps over which the rate falls to lr_floor", fraction, 0.3
    )
    lr_floor: float = _field("last rate as a share of the peak", fraction, 0.0)
    k_anneal_steps: int = _field(
        "steps over which k_start falls to k, linearly; 0 keeps k",
        whole_number,
        0,
    )
    k_start: int = _field(
        "active latents at first, when annealing", positive_int, shown="4 k", automatic=_k_start
    )
    beta2: float = _field("of Adam's second moments", proper_fraction, 0.99, before=0.999)
    lazy: bool = _field(
        "leave a latent's weights and moments as they are at a step without a gradient for it",
        _on_or_off,
        True,
        shown="on",
        before=False,
    )
    basis: str = _field(
        "in which Adam works: pca is the eigenbasis of the activations' covariance; the saved "
        "weights are turned back",
        str,
        "pca",
        choices=BASES,
        before="none",
    )
    grad_clip: float = _field(
        "largest norm of the gradient",
        positive_float,
        1.0,
    )
    k_aux: int = _field(
        "dead latents that AuxK uses",
        positive_int,
        shown="largest 2^n ≤ d_model",
        automatic=lambda given: 1 << (given.d_model.bit_length() - 1),
    )
    aux_coefficient: float = _field(
        "weight of AuxK in the loss", non_negative_float, 1 / 32, shown="1/32"
    )
    dead_tokens: int = _field(
        "a latent is dead after so many tokens without firing",
        positive_int,
        shown="10M, at most one epoch",
        automatic=lambda given: min(_DEAD_TOKENS, given.n_rows),
    )
    seed: int = _field("of the first weights", seed_number, 0)
    moments: str = _field(
        "how Adam's are kept; int8 takes 2 bytes per weight instead of 8",
        str,
        "float32",
        choices=MOMENT_KINDS,
        before="float32",
    )
    normalisation: str = _field(
        "of activations: each token standardised, all divided by one number, or as they are; "
        "sparsify and dictionary_learning can read the last two only, which cost FVU",
        str,
        "per_token_standardise",
        choices=NORMALISATIONS,
        before="per_token_standardise",
    )

    def learning_rate_at(self, step: int, n_steps: int) -> float:
        """Linear warm-up, constant, then linear decay to the floor; by steps."""
        warmup = max(1, round(self.warmup_fraction * n_steps))
        decay = max(1, round(self.decay_fraction * n_steps))
        decayed = self.lr_floor + (1 - self.lr_floor) * min(1.0, (n_steps - step) / decay)
        return self.learning_rate * min(1.0, (step + 1) / warmup) * decayed

    def k_at(self, step: int) -> int:
        """Active latents per token: linearly from k_start to k over the first steps."""
        remaining = max(0.0, 1 - step / self.k_anneal_steps) if self.k_anneal_steps else 0.0
        return self.k + round((self.k_start - self.k) * remaining)

    def arguments(self) -> dict[str, Any]:
        """Return what the manifest says, as if fields that came later and do nothing were not."""
        unsaid = {f.name: flag_of(f).before for f in fields(self)}
        return {name: v for name, v in asdict(self).items() if v != unsaid[name]}


def flag_of(of: Field) -> Flag:
    """Return how a field of `Recipe` is asked for."""
    return of.metadata["flag"]


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `Recipe`."""
    groups = {name: parser.add_argument_group(name) for name in ("autoencoder", "recipe")}
    for each in fields(Recipe):
        flag = flag_of(each)
        groups[flag.group].add_argument(
            f"--{each.name}",
            type=flag.kind,
            choices=flag.choices,
            help=f"{flag.text} [{_shown_default(each)}]",
        )


def _shown_default(of: Field) -> Any:
    return of.default if flag_of(of).shown == _VALUE else flag_of(of).shown


def recipe_table() -> str:
    """Return the flags of `Recipe` as a Markdown table."""
    lines = ["| flag | default | what it is |", "|---|---|---|"]
    for each in fields(Recipe):
        flag = flag_of(each)
        lines.append(f"| `--{each.name}` | {_shown_default(each)} | {flag.text} |")
    return "\n".join(lines) + "\n"


def resolve_recipe(
    args: argparse.Namespace,
    rows: BatchedRows,
    workers: Workers,
    begun: Mapping[str, Any] | None = None,
) -> Recipe:
    """Fill in what was not asked for: as a run that has begun has it, else the default.

    begun: the arguments that run recorded, {} or None for none. Raises UserError for all that
    cannot work.
    """
    facts, values = rows.facts, {}
    given = _Given(values, facts["batch_size"], rows.n_rows("train"), facts["d_model"])
    for each in fields(Recipe):
        flag, value = flag_of(each), getattr(args, each.name)
        # k_start is worth nothing without annealing, whatever was asked for.
        if each.name == "k_start" and not values["k_anneal_steps"]:
            value = None
        if value is None and begun:
            value = begun.get(each.name, flag.before)
        if value is None or value is _NEVER:
            value = flag.automatic(given) if flag.automatic else each.default
        values[each.name] = value
    recipe, problems = Recipe(**values), []
    if recipe.batch_size > given.n_rows:
        problems.append(
            f"--batch_size {recipe.batch_size} is larger than the {given.n_rows} training rows"
        )
    n_data, n_parts = workers.data.size, workers.latents.size
    if recipe.batch_size % n_data:
        problems.append(f"--batch_size {recipe.batch_size} does not divide among {n_data} ranks")
    if recipe.n_latents % n_parts:
        problems.append(
            f"--n_latents {recipe.n_latents} does not divide by --latent_parallel_size {n_parts}"
        )
    if n_parts > 1 and recipe.moments != "float32":
        problems.append(f"--moments {recipe.moments} is not for --latent_parallel_size")
    if recipe.k > recipe.n_latents:
        problems.append(f"--k {recipe.k} is larger than --n_latents {recipe.n_latents}")
    if recipe.k_start < recipe.k:
        problems.append(f"--k_start {recipe.k_start} is smaller than --k {recipe.k}")
    if recipe.k_start > recipe.n_latents:
        problems.append(f"--k_start {recipe.k_start} is larger than --n_latents {recipe.n_latents}")
    if problems:
        raise UserError("; ".join(problems))
    return recipe
