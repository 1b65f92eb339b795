#!/usr/bin/env bash
# All that is to be measured on a card, in one go: about eight minutes on an H100, by count.
# Results go to gpu_results.jsonl, a line each; a table of them ends the output. Send back both.
#
#   bash benchmarks/gpu.sh                        # needs 12 GB of the card, 25 GB of disk
#   bash benchmarks/gpu.sh --only step            # the lines whose names hold a word
#   bash benchmarks/gpu.sh --device cpu --tiny    # no figures: shows that every line runs
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
exec timeout --kill-after 10 1500 python -m benchmarks.gpu "$@"
