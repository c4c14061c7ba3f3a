#!/usr/bin/env bash
# Makes or uses .venv, installs dirl with its dev extra, runs the tests. Arguments go to pytest: bash scripts/test.sh -k views
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
install_dirl dev
install_for_tests lmdeploy --no-deps -r "$ROOT/tests/requirements-lmdeploy.txt" # its classes, beside the torch that is there
install_for_tests reasoning_gym "reasoning-gym>=0.1.25"
if [[ "$*" == *matrix* ]]; then # other people's clients of dirl serve
    install_for_tests openai "openai>=1.60"
    install_for_tests lm_eval "lm-eval[api,ifeval]>=0.4.9"
fi

# The report is tested in a real browser, and generated programs behind bubblewrap's walls, where they are there; root on
# Debian gets them (NO_APT=1: does not), others may skip those tests.
missing=()
command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
command -v bwrap >/dev/null || missing+=(bubblewrap)
if ((${#missing[@]})) && [[ -z ${NO_VENV:-}${NO_APT:-} && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]} for the tests"
    { timeout 120 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y --no-install-recommends "${missing[@]}"; } \
        >/dev/null 2>&1 || echo "${missing[*]} could not be installed: the tests that need them will be skipped"
fi

cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 4 ? cores : 4)) # each takes about 2 GB with the processes it starts
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline
cd "$ROOT"
# Later options win: `bash scripts/test.sh -m slow` runs the long tests, `-m matrix` further backends and long runs, `-n 0`
# one test at a time.
exec python3 -m pytest -n "$workers" --dist loadfile -m "not matrix and not slow and not chaos" "$@"
