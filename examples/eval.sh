#!/usr/bin/env bash
# Evaluation. Without arguments: the SFT model of the embedded default (made first when missing).
#   CONFIG=configs/sdar_8b/eval.yaml MODEL=/path/to/final DATASETS="MATH500 GSM8K" NUM_PROCESSES=8 bash examples/eval.sh
# Several processes share the problems; a killed evaluation continues, with any number of them.
# MODEL and DATASETS (separated by spaces) stand for model.path=... and data.datasets=[...].
# The other variables it reads (CONFIG, NUM_PROCESSES, ACCELERATE_CONFIG, DRY_RUN, ...) are listed in scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh"
choose_config eval
if [[ -n ${DATASETS:-} ]]; then
    read -ra names <<<"$DATASETS"
    for i in "${!names[@]}"; do names[i]=$(absolute_if_here "${names[i]}"); done
    set -- "data.datasets=[$(IFS=, && echo "${names[*]}")]" "$@"
fi
use_environment
if [[ -n ${MODEL:-} ]]; then
    set -- "model.path=$(absolute_if_here "$MODEL")" "$@"
elif is_embedded_default && ! names_model "$@"; then
    make_tiny_sft
fi
launch -m dirl.cli eval "$CONFIG" "$@"
