#!/usr/bin/env bash
# Sets up .venv and runs linters, types and the whole test suite. Extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
. ./environment.sh
ruff check .
ruff format --check .
pyright
python -m pytest --numprocesses "$(nproc 2>/dev/null || echo 2)" "$@"
