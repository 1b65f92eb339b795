# Sourced by quickstart.sh and run_tests.sh: makes .venv with everything that development needs.
# Installs again only when pyproject.toml or constraints.txt has changed.

PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed (set PYTHON to name one)" >&2
    exit 1
}
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv .venv
wanted=$(cat pyproject.toml constraints.txt environment.sh | sha256sum)
if [ "$(cat .venv/saint_installed 2>/dev/null)" != "$wanted" ]; then
    echo "installing the packages into .venv (about 1 GB, some minutes) ..."
    # Only what is imported gets compiled, when it is first: that saves a minute here.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        --constraint constraints.txt --editable '.[dev]'
    echo "$wanted" > .venv/saint_installed
fi
unset PYTHONDONTWRITEBYTECODE  # or every process would compile its imports anew
export PATH="$PWD/.venv/bin:$PATH"
