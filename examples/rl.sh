#!/usr/bin/env bash
# Reinforcement learning with DiPO. Without arguments: the embedded default, from its SFT model (made first when missing).
#   CONFIG=configs/sdar_8b/rl.yaml NUM_PROCESSES=8 bash examples/rl.sh model.path=/path/to/sft/final learning_rate=2e-6
# The variables it reads (CONFIG, NUM_PROCESSES, ACCELERATE_CONFIG, DRY_RUN, ...) are listed in scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/launch.sh"
choose_config rl
use_environment
if is_embedded_default && ! names_model "$@"; then make_tiny_sft; fi
launch -m dirl.cli rl "$CONFIG" "$@"
