#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes on one H200; needs no network.
#   bash scripts/gpu_check.sh [OUT]      OUT: folder for the results (default docs/benchmarks)
# Results: gpu.jsonl, the JSON lines of every benchmark; gpu.md, their tables; gpu.errors, what failed parts printed.
# Both hold all lines there are after every part. Parts that fail are named at the end and make the exit status 1; parts
# whose seconds no longer fit into TIME_LIMIT are named too.
#   TIME_LIMIT=540    seconds for everything        NO_VENV=1   use the Python on PATH (containers)
#   PARTS="tests train_8b_short"    these alone, in the order below
#   DIRL_COMMIT=...   what the lines call the commit, for a copy without .git
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${1:-$ROOT/docs/benchmarks}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
if [[ -z ${NO_VENV:-} && -x $ROOT/.venv/bin/python ]]; then PATH="$ROOT/.venv/bin:$PATH"; fi
cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# Named before gpu.jsonl, a tracked file, changes.
if [[ -z ${DIRL_COMMIT:-} && -e .git ]]; then
    DIRL_COMMIT=$(git describe --always --exclude='*' --abbrev=12 --dirty=+changes)
fi
export DIRL_COMMIT=${DIRL_COMMIT:-}
python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "scripts/gpu_check.sh needs a CUDA device that torch can use" >&2
    exit 2
}

LIMIT=${TIME_LIMIT:-540}
failed=() skipped=()
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f "$OUT/gpu.errors"

part() { # NAME SECONDS COMMAND...: its JSON lines are kept, also those of a part that fails or runs out of time
    local name=$1 seconds=$2 status=0
    shift 2
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    if ((seconds > LIMIT - SECONDS)); then
        skipped+=("$name")
        return
    fi
    echo "== $name"
    timeout -k 10 "$seconds" "$@" >"$work/stdout" 2>"$work/stderr" || status=$?
    cat "$work/stdout"
    if ((status)); then
        failed+=("$name")
        { echo "== $name: exit status $status" && cat "$work/stdout" "$work/stderr"; } >>"$OUT/gpu.errors"
        tail -n 5 "$work/stderr"
    fi
    if grep '^{.*}$' "$work/stdout" >>"$work/gpu.jsonl"; then
        cp "$work/gpu.jsonl" "$OUT/gpu.jsonl.tmp" && mv "$OUT/gpu.jsonl.tmp" "$OUT/gpu.jsonl"
        python3 scripts/bench_table.py "$OUT/gpu.jsonl" >"$OUT/gpu.md.tmp" && mv "$OUT/gpu.md.tmp" "$OUT/gpu.md"
    fi
}

# The files with GPU tests, by name: files beside them need packages that a GPU machine may lack.
tests=(tests/model/test_attention.py tests/rollout/local/test_block_cache.py tests/model/test_kernels.py)
budget=(--max-tokens-per-micro-batch 32768)
short=(--prompt 200 --completion 1000 --max-prompt 1024 --max-completion 2048 --group 2 "${budget[@]}" --padding own)
long=(--prompt 1024 --completion 8192 --max-prompt 1024 --max-completion 8192 --max-tokens-per-micro-batch 43008)
rollout=(--batch-sizes 64 256 --completion-length 64 --plain-sequences 1 --repeats 2)
# The seconds are caps; a part that reaches its own keeps its lines. The last parts run where time is left.
part tests 150 python3 -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}"
if python3 -c 'import lmdeploy' 2>/dev/null; then
    part lmdeploy_1.7b 170 python3 scripts/gpu_check_lmdeploy.py --models 1.7b
fi
part train_1.7b_short 110 python3 scripts/bench_train_step.py --model 1.7b "${short[@]}" --repeats 2
part train_8b_short 110 python3 scripts/bench_train_step.py --model 8b "${short[@]}" --layouts dirl --repeats 1
part train_8b_long 90 python3 scripts/bench_train_step.py --model 8b "${long[@]}" --layouts --repeats 1
if python3 -c 'import lmdeploy' 2>/dev/null; then
    part lmdeploy_8b 110 python3 scripts/gpu_check_lmdeploy.py --models 8b --parts parity push sleep speed
fi
part sft_1.7b 80 python3 scripts/bench_sft_step.py --model 1.7b "${budget[@]}" --attention tiles --padding none
part rollout_1.7b 60 python3 scripts/bench_rollout.py --model 1.7b "${rollout[@]}"
part rollout_8b 70 python3 scripts/bench_rollout.py --model 8b "${rollout[@]}"
part rollout_8b_compiled 100 python3 scripts/bench_rollout.py --model 8b --compile "${rollout[@]}"
part train_4b_short 90 python3 scripts/bench_train_step.py --model 4b "${short[@]}" --layouts dirl --repeats 1

if [[ -s $work/gpu.jsonl ]]; then cat "$OUT/gpu.md"; fi
echo "finished after $SECONDS s; results in $OUT"
((${#skipped[@]} == 0)) || echo "no time left for: ${skipped[*]}"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]} (see $OUT/gpu.errors)"
    exit 1
fi
