#!/usr/bin/env bash
# Makes or uses .venv, installs dirl with its dev extra, runs the tests. Arguments go to pytest: bash scripts/test.sh -k views
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
install_dirl dev
install_lmdeploy_for_tests

export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 WANDB_MODE=offline
cd "$ROOT"
exec python3 -m pytest "$@"
