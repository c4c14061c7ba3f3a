#!/usr/bin/env bash
# Makes or uses .venv, installs dirl with its dev extra, runs the tests. Arguments go to pytest: bash scripts/test.sh -k views
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
install_dirl dev
install_lmdeploy_for_tests

# The report is tested in a real browser where there is one; root on Debian gets it (NO_BROWSER=1: does not), others may
# skip those tests.
if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null &&
    [[ -z ${NO_VENV:-}${NO_BROWSER:-} && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing chromium for the tests of the report"
    { timeout 120 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y --no-install-recommends chromium; } \
        >/dev/null 2>&1 || echo "chromium could not be installed: the tests of the report in a browser will be skipped"
fi

cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 4 ? cores : 4)) # each takes about 2 GB with the processes it starts
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline
cd "$ROOT"
# Later options win: `bash scripts/test.sh -m matrix` runs the further backends and long runs, `-n 0` one test at a time.
exec python3 -m pytest -n "$workers" --dist loadfile -m "not matrix" "$@"
