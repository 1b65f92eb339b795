"""The demo's pairs: plain and steered completions as one batch, against one after the other.

    python -m benchmarks.demo --llama_model_dir Q/model --sae_model_path Q/trained_sae.pt

Times whole requests, the measurements at their end included; both ways in turn, medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial

from benchmarks.common import medians, seconds
from saint.stage.flags import positive_int
from saint.stage.program import run_stage
from saint.steering.completions import (
    complete_pairs,
    generate_ids,
    measure_effects,
    read,
    request_edits,
)
from saint.steering.settings import Request, Setting
from saint.steering.studio import EXAMPLE_PROMPTS, Studio, add_studio_flags, load_studio


def apart(studio: Studio, request: Request) -> list[list[list[int]]]:
    """Generate token by token in turn, each way a batch of its own, then read and measure."""
    prompts = studio.encode_prompts(request)
    lengths = [len(prompt) for prompt in prompts]
    edits = request_edits(studio, request, lengths)
    found = []
    for way in (None, edits):
        rows = [list(prompt) for prompt in prompts]
        for step in generate_ids(studio, prompts, request, way):
            for row, token in zip(rows, step, strict=True):
                row += [] if token is None else [token]
        found.append(rows)
    for plain, steered, n in zip(*found, lengths, strict=True):
        for ids in (plain, steered):
            read(studio, ids, n_prompt=n, settings=request.wishes)
        measure_effects(studio, request, [steered], [n])
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_studio_flags(parser)
    parser.add_argument("--repeats", type=positive_int, default=3, help="[%(default)s]")
    parser.add_argument("--max_new_tokens", type=positive_int, default=40, help="[%(default)s]")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    studio, _ = load_studio(args)
    results = []
    for n in (1, 4):
        wish = (Setting(3, "add", 1.0),)
        how = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": args.max_new_tokens}
        request = Request(EXAMPLE_PROMPTS[:n], wish, **how)
        before = apart(studio, request)
        pairs = complete_pairs(studio, request)
        ids = [[pair.plain.ids for pair in pairs], [pair.steered.ids for pair in pairs]]
        ways = {
            "apart": partial(seconds, partial(apart, studio, request), studio.model.device),
            "one": partial(seconds, partial(complete_pairs, studio, request), studio.model.device),
        }
        median = medians(ways, args.repeats)
        n_new = sum(len(new) for new in before[1]) - sum(map(len, studio.encode_prompts(request)))
        rates = {name: round(n_new / spent, 1) for name, spent in median.items()}
        results.append(
            {
                "prompts": n,
                "pair_tokens_per_s": rates,
                "ratio": round(median["apart"] / median["one"], 2),
                "same_tokens": ids == before,
            }
        )
    one, four = (found["pair_tokens_per_s"]["one"] for found in results)
    rates = {"pair_tokens_per_s_one_prompt": one, "pair_tokens_per_s_four_prompts": four}
    print(json.dumps({"dtype": str(studio.model.dtype), "results": results} | rates))


if __name__ == "__main__":
    run_stage(main)
