"""The command line of the stage that sends batches."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from saint.interpretation.batches import add_batch_flags
from saint.interpretation.prompts import OPTION_HELP, TASKS, PromptOptions
from saint.stage.flags import add_overwrite_flag, positive_int

DEFAULT_MODEL = "claude-haiku-5-5"


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the command line of interpret_top_sentences_send_batches.py."""
    parser = argparse.ArgumentParser(description=description)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--top_sentences_dict_filepath",
        type=Path,
        help="top_sentences_{mean,max,last}.yaml: the name chooses the ranking; evidence.parquet "
        "beside it is read instead where it is there (not needed to --cancel)",
    )
    files.add_argument(
        "--response_ids_filepath",
        type=Path,
        required=True,
        help="list of batch ids to write; the ledger lies beside it",
    )
    files.add_argument("--dataset_dir", help="parquet files of the sentences that were captured")
    files.add_argument("--text_column", default="text", help="their text column [text]")
    files.add_argument("--evidence_path", type=Path, help="another place of evidence.parquet")
    files.add_argument(
        "--labels_path", type=Path, help="parsed_responses.yaml, for --task detect and fuzz"
    )
    _add_choice_flags(parser)
    _add_money_flags(parser)
    evidence = parser.add_argument_group("evidence in one request")
    for option in fields(PromptOptions):
        text = f"{OPTION_HELP[option.name]} [{option.default}]"
        evidence.add_argument(
            f"--{option.name}", type=int, default=option.default, metavar="N", help=text
        )
    add_overwrite_flag(parser)
    return parser


def _add_choice_flags(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--task",
        choices=TASKS,
        default="explain",
        help="explain names latents; detect and fuzz test labels, intruder tests latents [explain]",
    )
    what.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"any model that the endpoint at ANTHROPIC_BASE_URL serves [{DEFAULT_MODEL}]",
    )
    what.add_argument("--latents", help="only these, such as 5,17,100-199 [all]")
    what.add_argument("--max_latents", type=positive_int, help="only the first so many [all]")
    what.add_argument(
        "--min_sentences",
        type=positive_int,
        default=5,
        help="skip latents that fire in fewer sentences [5]",
    )
    what.add_argument(
        "--n_controls",
        type=int,
        default=50,
        help="latents also tested with another latent's label, which should score 0.5 (intruder: "
        "with excerpts of other latents: 0.2 if marks or style alone give nothing away) [50]",
    )
    what.add_argument(
        "--plain_requests",
        action="store_true",
        help="send neither a JSON schema nor a thinking switch, for endpoints that know neither",
    )


def _add_money_flags(parser: argparse.ArgumentParser) -> None:
    money = parser.add_argument_group("money and limits")
    money.add_argument(
        "--dry_run",
        action="store_true",
        help="write the requests to <response ids>.dry_run.jsonl, show three, quote the cost, stop",
    )
    money.add_argument("--max_cost_usd", type=float, help="send nothing beyond this quote, in $")
    money.add_argument(
        "--batch_price", type=float, nargs=2, metavar=("IN", "OUT"), help="$ per million tokens"
    )
    money.add_argument(
        "--no_smoke_test", action="store_true", help="do not send one request live first"
    )
    money.add_argument(
        "--assume_lost",
        action="store_true",
        help="send again what was begun and cannot be found at the API",
    )
    money.add_argument(
        "--settle_s",
        type=float,
        default=120,
        help="seconds after which a batch that is not listed was never made [120]",
    )
    money.add_argument("--cancel", action="store_true", help="cancel all batches that still run")
    add_batch_flags(parser)
