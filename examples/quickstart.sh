#!/usr/bin/env bash
# From nothing to a trained model: makes .venv, then SFT -> RL -> evaluation of both on the embedded default, minutes on a CPU.
# Safe to run again: the installation is kept, and finished or interrupted runs continue from outputs/tiny/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup_env.sh"
unset CONFIG MODEL DATASETS DRY_RUN
install_dirl

for stage in sft rl; do
    echo "== $stage"
    bash "$ROOT/examples/$stage.sh"
done
for stage in sft rl; do
    echo "== eval of outputs/tiny/$stage/final"
    bash "$ROOT/examples/eval.sh" "model.path=outputs/tiny/$stage/final" "output_dir=outputs/tiny/eval_$stage"
done

cd "$ROOT"
python3 scripts/compare_runs.py "after SFT=outputs/tiny/eval_sft/results.json" "after RL=outputs/tiny/eval_rl/results.json" \
    --plots outputs/tiny/sft outputs/tiny/rl
