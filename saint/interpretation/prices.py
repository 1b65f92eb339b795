"""What a batch costs: a dated price table and estimates of tokens and dollars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from saint.stage.errors import UserError

PRICES_DATE = "2026-11"
# Batch prices in $ per million tokens: input, output. A live request costs twice that.
BATCH_PRICES = {
    "claude-haiku-5-5": (0.05, 0.25),
    "claude-sonnet-5-5": (1.0, 5.0),
    "claude-opus-5-5": (2.0, 10.0),
}
LIVE_FACTOR = 2
# Without a key tokens are estimated: so many for one of our own tokenizer's (a captured model's),
# which has that many characters in such requests (SmolLM2: their odd words make short tokens).
TOKENS_PER_OWN_TOKEN = 1.2
CHARS_PER_OWN_TOKEN = 3.6


@dataclass(frozen=True)
class Quote:
    """An estimate for n_requests: tokens in and out, dollars (None: price unknown), and how."""

    n_requests: int
    input_tokens: int
    output_tokens: int
    dollars: float | None
    basis: str

    def __str__(self) -> str:
        cost = f"${self.dollars:.4f}" if self.dollars is not None else "price unknown"
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
    if quote.dollars > max_cost_usd:
        raise UserError(f"{quote} exceeds --max_cost_usd {max_cost_usd:g}: nothing was sent")
