#!/usr/bin/env bash
# Trains a job:  ./run_train.sh [job.toml] [--section.key=value ...]
# Without a job it runs the built-in demo: unpacks a trained miniature LTX-2.3, teaches it with LoRA a shape that it has
# never seen, and shows clips before and after, on one GPU or a CPU. Sets up its own .venv if packages are missing, then
# calls `ltx-titan train`, which reads the variables from NGPU to MAX_RESTARTS.
#
#   NGPU          processes on this node     (default: the visible GPUs, or 1)
#   NNODES        nodes in the job           (default 1); then also, on every node:
#   NODE_RANK     number of this node        (default 0)
#   MASTER_ADDR   address of node 0          (default localhost)
#   MASTER_PORT   a free port there          (default 29500)
#   MAX_RESTARTS  times that ranks are started again after one has failed; they resume  (default 0)
#   CONFIG        the job, if it is not the first argument
#   PYTHON        Python to start with       (default python3)
#   LTX_TITAN_TORCH  torch requirement for the .venv, e.g. torch==2.11.0
#
#   ./run_train.sh --help     prints this; `ltx-titan --help` lists the other commands
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    # The comment above, at once: before packages are looked for.
    sed -n '2,/^set /{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

PYTHON=$("${PYTHON:-python3}" "$ROOT/ltx_titan/bootstrap.py" preprocess)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
JOB=${CONFIG:-} DATA=
if [[ $# -gt 0 && $1 != --* ]]; then JOB=$1; shift; fi
# Two jobs make their own data, also when they are named by their path: the demo, and a smaller one on a random pack.
if [[ -z $JOB || $JOB -ef $ROOT/train_configs/nano_concept.toml ]]; then
    cd "$ROOT"
    JOB=train_configs/nano_concept.toml DATA=outputs/concept-data SIZE=64x64x25
    PACK=$DATA/nano/ltx-2.3-nano-trained.safetensors
    "$PYTHON" -m ltx_titan.cli make-nano "$DATA/nano" --trained
    "$PYTHON" -m ltx_titan.cli make-clips "$DATA/clips" --count 96 --concept --known 96
elif [[ $JOB -ef $ROOT/train_configs/debug.toml ]]; then
    cd "$ROOT"
    JOB=train_configs/debug.toml DATA=outputs/debug-data SIZE=256x160x25
    PACK=$DATA/nano/ltx-2.3-nano.safetensors
    "$PYTHON" -m ltx_titan.cli make-nano "$DATA/nano"
    "$PYTHON" -m ltx_titan.cli make-debug-dataset "$DATA/clips"
fi
if [[ -n $DATA ]]; then
    export NGPU=${NGPU:-1}
    "$PYTHON" -m ltx_titan.cli process-dataset "$DATA/clips/dataset.jsonl" --resolution-buckets "$SIZE" \
        --model-path "$PACK" --text-encoder-path "$DATA/nano/text_encoder" --output-dir "$DATA/precomputed"
    # Many CPUs have no bfloat16 units: a matmul takes fifty times as long as in float32.
    if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then set -- --training.dtype=float32 "$@"; fi
fi

exec "$PYTHON" -m ltx_titan.cli train "$JOB" "$@"
