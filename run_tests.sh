#!/usr/bin/env bash
# Sets up .venv and runs linters, types and the whole test suite. Extra arguments go to pytest.
# With --peers: SAEs in and out through the real packages of other tools, in .venv-bench.
set -euo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = --peers ]; then
    shift
    wanted=$(cat pyproject.toml run_tests.sh | sha256sum)
    if [ "$(cat .venv-bench/saint_installed 2>/dev/null)" != "$wanted" ]; then
        echo "installing other tools' packages into .venv-bench (about 1.5 GB, some minutes) ..."
        [ -x .venv-bench/bin/python ] || "${PYTHON:-python3}" -m venv .venv-bench
        pip=(.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
        "${pip[@]}" "torch==$(sed -n 's/^torch==//p' constraints.txt)" pytest pyarrow pyyaml xxhash \
            sae-lens==6.54.0 eai-sparsify==1.3.3 neuronpedia==1.2.1
        # Its wheel wants nnsight < 0.4, which its dictionaries do not use.
        "${pip[@]}" --no-deps dictionary-learning==0.1.0
        echo "$wanted" > .venv-bench/saint_installed
    fi
    # The suite's own settings and fixtures name packages that are not there.
    exec .venv-bench/bin/python -m pytest -c /dev/null --rootdir . --noconftest -o pythonpath=. \
        -p no:cacheprovider -q -s "$@" tests/exchange/test_peers.py
fi
. ./environment.sh
ruff check .
ruff format --check .
pyright
python -m pytest --numprocesses "$(nproc 2>/dev/null || echo 2)" "$@"
