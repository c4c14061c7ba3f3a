#!/usr/bin/env bash
# Supervised fine-tuning. Without arguments: the embedded default, on this machine.
#   CONFIG=configs/sdar_8b/sft.yaml NUM_PROCESSES=8 bash examples/sft.sh model.path=/path/to/SDAR-8B-Chat learning_rate=2e-5
# The variables it reads (CONFIG, NUM_PROCESSES, ACCELERATE_CONFIG, DRY_RUN, ...) are listed in scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh"
choose_config sft
use_environment
if is_embedded_default && ! names_model "$@"; then make_tiny_base; fi
launch -m dirl.cli sft "$CONFIG" "$@"
