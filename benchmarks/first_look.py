"""The demo's first screen in Chromium: how long until a finished pair shows, and the slider's.

    python -m benchmarks.first_look --llama_model_dir Q/model --sae_model_path Q/trained_sae.pt

Starts the demo on a free port as its own command does, opens the page --openings times in a new
browser context, then moves the dose slider to and fro. `pair_s` runs from the navigation to the
first coloured steered token that is visible; `slider_ms` from the key press to the next frame in
which the other text stands. `served_after_s` is the command's own start, the model's loading and
the pairs that it makes beforehand included. Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import served_demo
from saint.stage.flags import positive_int
from saint.stage.program import run_stage

_MOVE = """
async (slider) => {
  const shown = () => document.querySelector('#opening .variant:not([hidden])');
  const times = [];
  for (let i = 0; i < 60; i++) {
    const before = shown(), started = performance.now();
    const up = Number(slider.value) < Number(slider.max) && i % 12 < 6;
    slider.value = Number(slider.value) + (up ? 1 : -1) * Number(slider.step || 1);
    slider.dispatchEvent(new Event('input', {bubbles: true}));
    await new Promise(requestAnimationFrame);
    if (shown() !== before) times.push(performance.now() - started);
  }
  return times;
}
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama_model_dir", type=Path, required=True)
    parser.add_argument("--sae_model_path", type=Path, required=True)
    parser.add_argument("--openings", type=positive_int, default=5, help="[%(default)s]")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from playwright import sync_api

    started = time.monotonic()
    with served_demo(args.llama_model_dir, args.sae_model_path) as (url, _):
        found: dict[str, float] = {"served_after_s": round(time.monotonic() - started, 2)}
        with sync_api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=args.chromium)
            seconds, moves = [], []
            for _ in range(args.openings):
                tab = browser.new_context().new_page()
                started = time.monotonic()
                tab.goto(url, wait_until="commit")
                tab.wait_for_selector("#opening .pane:not(.plain) .tok:visible")
                seconds.append(time.monotonic() - started)
                moves += tab.locator("#opening input[type=range]").evaluate(_MOVE)
                tab.context.close()
            browser.close()
    found |= {
        "pair_s": round(statistics.median(seconds), 2),
        "pair_worst_s": round(max(seconds), 2),
    }
    found |= {
        "slider_ms": round(statistics.median(moves), 1),
        "slider_worst_ms": round(max(moves), 1),
    }
    print(json.dumps(found | {"openings": args.openings, "moves": len(moves)}))


if __name__ == "__main__":
    run_stage(main)
