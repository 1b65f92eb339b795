"""What a batch costs: a dated price table and estimates of tokens and dollars."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anthropic

from saint.interpretation.client import describe, fail
from saint.stage.errors import UserError, log

PRICES_DATE = "2026-11"
# Batch prices in $ per million tokens: input, output. A live request costs twice that. Of the other
# models that the SDK names no price is known here: --batch_price.
BATCH_PRICES = {
    "claude-haiku-5-5": (0.05, 0.25),
    "claude-haiku-4-5": (0.5, 2.5),
    "claude-sonnet-5-5": (1.0, 5.0),
    "claude-sonnet-5": (1.0, 5.0),
    "claude-opus-5-5": (2.0, 10.0),
    "claude-opus-5": (2.5, 12.5),
    "claude-fable-5-1": (5.0, 25.0),
}
# These think whatever they are asked.
_THINKERS = ("claude-opus-5-5", "claude-fable-5-1")
LIVE_FACTOR = 2
# Without a key tokens are estimated: so many for one of our own tokenizer's (a captured model's),
# which has that many characters in such requests (SmolLM2: their odd words make short tokens).
TOKENS_PER_OWN_TOKEN = 1.2
CHARS_PER_OWN_TOKEN = 3.6


@dataclass(frozen=True)
class Quote:
    """An estimate for n_requests: tokens in and out, dollars (None: price unknown), and how.

    thinking: what thoughts may cost beside that, in dollars, where the model cannot but think.
    """

    n_requests: int
    input_tokens: int
    output_tokens: int
    dollars: float | None
    basis: str
    thinking: float | None = None

    def __str__(self) -> str:
        cost = f"${self.dollars:.4f}" if self.dollars is not None else "price unknown"
        cost += f", and up to ${self.thinking:.4f} for thoughts" if self.thinking else ""
        return (
            f"{self.n_requests:,} requests, about {self.input_tokens:,} tokens in and "
            f"{self.output_tokens:,} out: {cost} ({self.basis})"
        )


def batch_price(model: str, given: Iterable[float] | None = None) -> tuple[float, float] | None:
    """Return $ per million input and output tokens in a batch, None for an unknown model."""
    if given is not None:
        price_in, price_out = given
        return price_in, price_out
    return BATCH_PRICES.get(model)


def is_free(model: str, given: Iterable[float] | None = None) -> bool:
    """Whether a live request costs nothing as far as is known: a local server's model."""
    return batch_price(model, given) in (None, (0.0, 0.0))


def dollars(
    price: tuple[float, float] | None, input_tokens: float, output_tokens: float
) -> float | None:
    """Return what tokens cost at a batch price; None when the price is unknown."""
    if price is None:
        return None
    return (input_tokens * price[0] + output_tokens * price[1]) / 1e6


def check_budget(quote: Quote, max_cost_usd: float | None, model: str) -> None:
    """Raise UserError when a quote exceeds the budget, or cannot be compared with it."""
    if max_cost_usd is None:
        return
    if quote.dollars is None:
        raise UserError(
            f"--max_cost_usd needs a price: {model} is not in the table of {PRICES_DATE}; "
            "give --batch_price IN OUT ($ per million tokens)"
        )
    if quote.dollars + (quote.thinking or 0) > max_cost_usd:
        raise UserError(f"{quote} exceeds --max_cost_usd {max_cost_usd:g}: nothing was sent")


@dataclass
class RequestTally:
    """What prepared requests add up to, and a small seeded sample of them."""

    n: int = 0
    chars: int = 0
    sample: list[dict[str, Any]] = field(default_factory=list)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, params: dict[str, Any], *, sample_size: int = 10) -> None:
        """Count one request's parameters."""
        self.n += 1
        self.chars += prompt_chars(params)
        if len(self.sample) < sample_size:
            self.sample.append(params)
        elif (place := self._rng.randrange(self.n)) < sample_size:
            self.sample[place] = params


def prompt_chars(params: dict[str, Any]) -> int:
    """Characters of the system prompt and the user's turn."""
    return len(params["system"]) + sum(len(m["content"]) for m in params["messages"])


def estimate(
    client: anthropic.Anthropic | None,
    tally: RequestTally,
    *,
    output_tokens_each: int,
    thinking_tokens_each: int = 0,
    price: tuple[float, float] | None,
    n_live: int,
) -> Quote:
    """Quote prepared requests: tokens counted by the API on a sample, or by a ratio to our own.

    n_live: requests among them that are sent live, at twice the batch price.
    """
    ratio = CHARS_PER_OWN_TOKEN / TOKENS_PER_OWN_TOKEN
    basis = (
        f"not counted by the API but taken as {TOKENS_PER_OWN_TOKEN:g} times the tokens of our own "
        f"tokenizer, {CHARS_PER_OWN_TOKEN:g} characters each"
    )
    counted = _count_sample(client, tally.sample) if client else None
    if counted:
        ratio = sum(map(prompt_chars, tally.sample)) / counted
        basis = f"from {len(tally.sample)} requests that the API counted"
    tokens_in = round(tally.chars / ratio)
    tokens_out = output_tokens_each * tally.n
    factor = 1 + n_live * (LIVE_FACTOR - 1) / max(1, tally.n)
    cost, thinking = dollars(price, tokens_in, tokens_out), None
    if cost is not None and price is not None:
        cost *= factor
        thinking = dollars(price, 0, thinking_tokens_each * tally.n)
        thinking = thinking * factor if thinking else None
    basis = f"{basis}; prices of {PRICES_DATE}"
    return Quote(tally.n, tokens_in, tokens_out, cost, basis, thinking)


def price_table(tasks: Mapping[str, tuple[RequestTally, float, int]]) -> str:
    """A table of what each task would cost with each known model, in a batch.

    tasks: name -> a tally of some requests, how many times as many there are, and the output tokens
    of one.
    """
    names = [model.removeprefix("claude-") for model in BATCH_PRICES]
    head = f"{'$ (' + PRICES_DATE + ')':<12}{'tokens in':>13}{'out':>12}"
    lines = [head + "".join(f"{name:>{len(name) + 2}}" for name in names)]
    for task, (tally, times, out_each) in tasks.items():
        tokens_in = tally.chars * times / CHARS_PER_OWN_TOKEN * TOKENS_PER_OWN_TOKEN
        tokens_out = tally.n * times * out_each
        costs = [dollars(price, tokens_in, tokens_out) or 0.0 for price in BATCH_PRICES.values()]
        cells = "".join(
            f"{cost:>{len(name) + 2}.2f}" for cost, name in zip(costs, names, strict=True)
        )
        lines.append(f"{task:<12}{tokens_in:>13,.0f}{tokens_out:>12,.0f}{cells}")
    thinkers = " and ".join(name.removeprefix("claude-") for name in _THINKERS)
    return "\n".join([*lines, f"{thinkers} also think, at the price of output; live costs twice"])


def _count_sample(client: anthropic.Anthropic, sample: list[dict[str, Any]]) -> int | None:
    total = 0
    for params in sample:
        kept = {name: value for name, value in params.items() if name != "max_tokens"}
        try:
            total += client.messages.count_tokens(**kept).input_tokens
        except anthropic.APIError as error:
            if getattr(error, "status_code", None) == 401:
                fail("counting tokens", error)
            log.warning("tokens are estimated: the API does not count them (%s)", describe(error))
            return None
    return total or None
