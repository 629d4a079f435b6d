#!/usr/bin/env bash
# Runs the tests:  tests/run.sh [pytest arguments]      Sets up its own .venv where packages are missing.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
PYTHON=$("${PYTHON:-python3}" ltx_titan/bootstrap.py preprocess tools test)
# One thread per process: the suite runs several processes, and oversubscribed cores are slower than idle ones.
# The suite starts some hundred processes: without bytecode each would compile all modules again.
export PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# In the order of collection, which tests/conftest.py chooses: the files that take longest come first.
exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -m "not gpu" "$@"
