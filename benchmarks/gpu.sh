#!/bin/sh
# One window on a GPU, all of it in one call: the kernels' bench, then whole models; every line is on the disk as soon
# as it is known.
#   sh benchmarks/gpu.sh [SECONDS [FOLDER]]      PYTHON=python3; a FOLDER with results of this code is gone on with
# JAX_COMPILATION_CACHE_DIR=/tmp/programs keeps what is compiled, to be carried to another window: tuning XLA's products
# takes most of a step's first minute.
# What that Python lacks is installed from wheels/ (`make wheels`, where there is a network) into a temporary folder.
set -u
cd "$(dirname "$0")/.."
began=$(date +%s)
budget=${1:-540}
folder=${2:-results/gpu-$(date +%Y%m%d-%H%M%S)}
python=${PYTHON:-python3}
mkdir -p "$folder"

if ! "$python" -c 'import hydra, plotly, pydantic' 2>/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

"$python" -m pallas_kernels.bench --budget $((budget * 55 / 100)) --json "$folder/bench.jsonl" --resume
status=$?
left=$((budget - $(date +%s) + began))
"$python" -m benchmarks.on_gpu --budget "$left" --output "$folder/on_gpu.jsonl" --resume || status=$?
exit $status
