#!/usr/bin/env bash
# Trains a job:  ./run_train.sh [job.toml] [--section.key=value ...]
# Without a job it runs the embedded default: makes a miniature LTX-2.3 pack, prepares clips from the video that ships
# with the project, and trains on them, on one GPU or a CPU. Sets up its own .venv where packages are missing.
#
#   NGPU          processes on this node     (default: the GPUs that are visible, or 1)
#   NNODES        nodes in the job           (default 1); then also, on every node:
#   NODE_RANK     number of this node        (default 0)
#   MASTER_ADDR   address of node 0          (default localhost)
#   MASTER_PORT   a free port there          (default 29500)
#   CONFIG        the job, where not given as the first argument
#   PYTHON        Python to start from       (default python3)
#   LTX_TITAN_TORCH  torch requirement for the .venv, e.g. torch==2.11.0
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

PYTHON=$("${PYTHON:-python3}" "$ROOT/ltx_titan/bootstrap.py" preprocess)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Fewer, larger blocks: long jobs with several shapes otherwise run out of memory to fragmentation.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

GPUS=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then GPUS=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .); fi
JOB=${CONFIG:-}
if [[ $# -gt 0 && $1 != --* ]]; then JOB=$1; shift; fi
if [[ -z $JOB ]]; then
    cd "$ROOT"
    JOB=train_configs/debug.toml
    NGPU=${NGPU:-1}
    DATA=outputs/debug-data
    "$PYTHON" -m ltx_titan.cli make-nano "$DATA/nano"
    "$PYTHON" -m ltx_titan.cli make-debug-dataset "$DATA/clips"
    "$PYTHON" -m ltx_titan.cli process-dataset "$DATA/clips/dataset.jsonl" --resolution-buckets "256x160x25" \
        --model-path "$DATA/nano/ltx-2.3-nano.safetensors" --text-encoder-path "$DATA/nano/text_encoder" \
        --output-dir "$DATA/precomputed"
    # Many CPUs multiply bfloat16 numbers one by one, fifty times slower than float32.
    if [[ $GPUS -eq 0 ]]; then set -- --training.dtype=float32 "$@"; fi
fi

NGPU=${NGPU:-$((GPUS > 0 ? GPUS : 1))}
NNODES=${NNODES:-1}
if [[ $NNODES -gt 1 ]]; then
    RENDEZVOUS=(--node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:?MASTER_ADDR: the address of node 0}"
                --master-port "${MASTER_PORT:-29500}")
elif [[ -n ${MASTER_PORT:-} ]]; then
    RENDEZVOUS=(--master-addr "${MASTER_ADDR:-localhost}" --master-port "$MASTER_PORT")
else
    RENDEZVOUS=(--rdzv-backend c10d --rdzv-endpoint localhost:0)
fi
exec "$PYTHON" -m ltx_titan.launch --nnodes "$NNODES" --nproc-per-node "$NGPU" "${RENDEZVOUS[@]}" \
    --local-ranks-filter 0 --role rank --tee 3 -m ltx_titan.train "$JOB" "$@"
