#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes on one H200; needs no network.
#   bash scripts/gpu_check.sh [OUT]      OUT: folder for gpu.jsonl, the JSON lines of every benchmark (default docs/benchmarks)
# Parts that fail are named at the end and make the exit status 1; parts that no longer fit into TIME_LIMIT are named too.
#   TIME_LIMIT=560    seconds for everything        NO_VENV=1   use the Python on PATH (containers)
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${1:-$ROOT/docs/benchmarks}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
if [[ -z ${NO_VENV:-} && -x $ROOT/.venv/bin/python ]]; then PATH="$ROOT/.venv/bin:$PATH"; fi
cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "scripts/gpu_check.sh needs a CUDA device that torch can use" >&2
    exit 2
}

LIMIT=${TIME_LIMIT:-560}
failed=() skipped=()

part() { # NAME SECONDS COMMAND...: lines that are JSON go to gpu.jsonl, everything to the terminal
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS))
    shift 2
    if ((left < 20)); then
        skipped+=("$name")
        return
    fi
    echo "== $name"
    timeout "$((seconds < left ? seconds : left))" "$@" 2>"$OUT/$name.stderr" | tee >(grep '^{' >>"$OUT/gpu.jsonl")
    if [[ ${PIPESTATUS[0]} != 0 ]]; then
        failed+=("$name")
        tail -n 5 "$OUT/$name.stderr"
    else
        rm -f "$OUT/$name.stderr"
    fi
}

: >"$OUT/gpu.jsonl"
part tests 150 python3 -m pytest -q -m gpu -p no:cacheprovider tests/model tests/training tests/rollout
short=(--prompt 200 --completion 1000 --max-prompt 1024 --max-completion 2048 --group 8 --max-tokens-per-micro-batch 32768)
long=(--prompt 1024 --completion 8192 --max-prompt 1024 --max-completion 8192 --max-tokens-per-micro-batch 32768)
part train_8b_long 170 python3 scripts/bench_train_step.py --model 8b "${long[@]}" --repeats 1
part train_8b_short 100 python3 scripts/bench_train_step.py --model 8b "${short[@]}" --group 2 --repeats 2
part rollout_8b 80 python3 scripts/bench_rollout.py --model 8b --batch-sizes 64 256 --completion-length 64 --plain-sequences 1 --repeats 1
part rollout_8b_compiled 80 python3 scripts/bench_rollout.py --model 8b --compile --batch-sizes 64 256 --completion-length 64 --plain-sequences 1 --repeats 2
part rollout_1.7b 60 python3 scripts/bench_rollout.py --model 1.7b --batch-sizes 64 256 --completion-length 64 --plain-sequences 1 --repeats 1
if python3 -c 'import lmdeploy' 2>/dev/null && [[ -f scripts/gpu_check_lmdeploy.py ]]; then
    part lmdeploy 200 python3 scripts/gpu_check_lmdeploy.py
fi
part train_1.7b_short 60 python3 scripts/bench_train_step.py --model 1.7b "${short[@]}" --repeats 2
part train_1.7b_long 90 python3 scripts/bench_train_step.py --model 1.7b "${long[@]}" --repeats 1
part sft_1.7b 60 python3 scripts/bench_sft_step.py --model 1.7b --documents 64 --max-tokens-per-micro-batch 32768
part train_4b_short 80 python3 scripts/bench_train_step.py --model 4b "${short[@]}" --group 2 --repeats 2
part train_4b_long 120 python3 scripts/bench_train_step.py --model 4b "${long[@]}" --repeats 1

python3 scripts/benchmark_table.py "$OUT/gpu.jsonl"
echo "finished after $SECONDS s; lines in $OUT/gpu.jsonl"
((${#skipped[@]} == 0)) || echo "no time left for: ${skipped[*]}"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]} (see $OUT/*.stderr)"
    exit 1
fi
