#!/usr/bin/env bash
# Runs the tests:  tests/run.sh [pytest arguments]      Sets up its own .venv where packages are missing.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
PYTHON=$("${PYTHON:-python3}" ltx_titan/bootstrap.py preprocess tools test)
# One thread per process: the suite runs several processes, and oversubscribed cores are slower than idle ones.
# The suite starts some hundred processes: without bytecode each would compile all modules again.
export PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Temporary files in memory where there is plenty: saves wait for the disk at each fsync, a fifth of their tests' time.
# The folder's own limit says nothing about the memory behind it. In KiB; the suite writes about 4 GiB.
room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1) || room=0
memory=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo 2>/dev/null) || memory=0
if [ "${room:-0}" -gt $((12 << 20)) ] && [ "${memory:-0}" -gt $((16 << 20)) ]; then
  TMPDIR=$(mktemp -d -p /dev/shm)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
fi
# Three workers: with four, two cores took 22 % longer for a quarter of the suite.
# In the order of collection, which tests/conftest.py chooses: the files that take longest come first.
"$PYTHON" -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -m "not gpu" "$@"
