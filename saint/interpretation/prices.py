"""What a batch costs: a dated price table and estimates of tokens and dollars."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anthropic

from saint.interpretation.client import describe, fail
from saint.stage.errors import UserError, log
from saint.stage.flags import non_negative_float, positive_int

PRICES_DATE = "2026-11"
# Batch prices in $ per million tokens: input, output, by the models' pages in Claude's
# documentation. None: named by the SDK, but no page with its price was found. A live request costs
# twice that; Claude Haiku 5.5 costs five times as much for prompts of more than 100,000 tokens,
# which none of ours has.
BATCH_PRICES: dict[str, tuple[float, float] | None] = {
    "claude-haiku-5-5": (0.05, 0.25),
    "claude-haiku-4-5": (0.5, 2.5),
    "claude-sonnet-5-5": (1.0, 5.0),
    "claude-sonnet-5": (1.0, 5.0),
    "claude-sonnet-4-6": (1.5, 7.5),
    "claude-sonnet-4-5": (1.5, 7.5),
    "claude-opus-5-5": (2.0, 10.0),
    "claude-opus-5": (2.5, 12.5),
    "claude-opus-4-8": (2.5, 12.5),
    "claude-opus-4-7": (2.5, 12.5),
    "claude-opus-4-6": (2.5, 12.5),
    "claude-opus-4-5": (2.5, 12.5),
    "claude-fable-5-2": (4.0, 20.0),
    "claude-fable-5-1": (5.0, 25.0),
    "claude-fable-5": (5.0, 25.0),
    "claude-mythos-5-2": None,
    "claude-mythos-5-1": None,
    "claude-mythos-5": (5.0, 25.0),
    "claude-mythos-preview": None,
}
# "claude-haiku-4-5-20251001" costs what "claude-haiku-4-5" does.
_SNAPSHOT = re.compile(r"-20\d{6}$")
# These think whatever they are asked.
_THINKERS = ("opus-5-5", "fable", "mythos")
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
    return BATCH_PRICES.get(_SNAPSHOT.sub("", model))


def is_free(model: str, given: Iterable[float] | None = None) -> bool:
    """Whether a live request costs nothing as far as is known: a local server's model.

    A Claude without a known price is not free.
    """
    price = batch_price(model, given)
    return price == (0.0, 0.0) or (price is None and "claude" not in model.lower())


def add_money_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of whoever sends requests: what they may cost, and how they go out."""
    money = parser.add_argument_group("money and limits")
    money.add_argument(
        "--dry_run",
        action="store_true",
        help="write the requests to <response ids>.dry_run.jsonl, show three, quote the cost, stop",
    )
    money.add_argument(
        "--max_cost_usd", type=non_negative_float, help="send nothing beyond this quote, in $"
    )
    money.add_argument(
        "--batch_price",
        type=non_negative_float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="$ per million tokens",
    )
    money.add_argument(
        "--live",
        type=positive_int,
        metavar="N",
        help="no batch: N requests at a time through /v1/messages, at twice the price of a batch",
    )
    money.add_argument(
        "--no_smoke_test", action="store_true", help="do not send one request live first"
    )
    money.add_argument(
        "--assume_lost",
        action="store_true",
        help="send again what was interrupted live, or may be a batch that cannot be read",
    )
    money.add_argument("--cancel", action="store_true", help="cancel all batches that still run")


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


def request_parts(sample: Iterable[dict[str, Any]]) -> str:
    """Say which share of some requests' characters each part of the question takes."""
    sizes: dict[str, int] = {}
    for params in sample:
        sizes["instructions"] = sizes.get("instructions", 0) + len(params["system"])
        for message in params["messages"]:
            for part in message["content"].split("\n\n"):
                title = part.partition("\n")[0].partition(":")[0].partition(" (")[0]
                title = title if len(title) < len(part) else "the rest"
                sizes[title] = sizes.get(title, 0) + len(part)
    whole = sum(sizes.values()) or 1
    shares = sorted(sizes.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{size / whole:.0%} {title}" for title, size in shares)


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
    tokens = {
        task: (
            tally.chars * times / CHARS_PER_OWN_TOKEN * TOKENS_PER_OWN_TOKEN,
            tally.n * times * out_each,
        )
        for task, (tally, times, out_each) in tasks.items()
    }
    alike: dict[tuple[float, float] | None, list[str]] = {}
    for model, price in BATCH_PRICES.items():
        alike.setdefault(price, []).append(model.removeprefix("claude-"))
    rows = [("", list(tasks))]
    rows += [
        (name, [f"{tokens[task][place]:,.0f}" for task in tasks])
        for place, name in enumerate(("tokens in", "tokens out"))
    ]
    for price, models in alike.items():
        costs = [dollars(price, *tokens[task]) for task in tasks]
        cells = ["unknown" if cost is None else f"${cost:.2f}" for cost in costs]
        rows.append((", ".join(models), cells))
    width = max(len(name) for name, _ in rows)
    lines = [name.ljust(width) + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    note = f"batches, prices of {PRICES_DATE}; live costs twice; "
    return "\n".join([*lines, note + f"{', '.join(_THINKERS)} also think, at the price of output"])


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
