#!/usr/bin/env bash
# Fetches models and data sets from the Hugging Face hub; run it again to continue, to check, or to update.
#   bash download.sh model JetLM/SDAR-8B-Chat          a model into ./models
#   bash download.sh data MATH500 GSM8K                benchmarks into ./data/eval/NAME.json, counted and hashed
#   bash download.sh data all                          all of them (scripts/convert_benchmark.py lists them)
#   bash download.sh data OWNER/NAME [options]         any data set, as it is, into ./data
# HF_TOKEN (gated repositories) and HF_ENDPOINT (mirrors) are read from the environment, and no token from anywhere else.
# Extra arguments after OWNER/NAME go to `hf download`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ ! -x .venv/bin/hf ]] || PATH="$PWD/.venv/bin:$PATH"
export HF_TOKEN_PATH=/dev/null PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

BENCHMARKS="GSM8K MATH500 AIME2024 AIME2025 OlympiadBench HumanEval MBPP"

die() { # EXIT_CODE MESSAGE
    echo "download.sh: $2" >&2
    exit "$1"
}

usage() {
    echo "usage: bash download.sh model OWNER/NAME [hf download options] | data NAME...|all|OWNER/NAME [options]; NAME: $BENCHMARKS" >&2
    exit 2
}

fetch() { # TYPE REPOSITORY FOLDER [hf download options]
    local log reason
    log=$(mktemp)
    # People at a terminal see the progress; everybody else sees one line when it fails.
    if [[ -t 2 ]]; then
        hf download "$2" --repo-type "$1" --local-dir "$3" "${@:4}" 2> >(tee "$log" >&2) && rm -f "$log" && return
    else
        hf download "$2" --repo-type "$1" --local-dir "$3" "${@:4}" 2>"$log" && rm -f "$log" && return
    fi
    reason=$(sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -vE '^[[:space:]]*$|^Hint' | tail -n 1 | cut -c1-200) || true
    rm -f "$log"
    die 1 "could not fetch $2 from ${HF_ENDPOINT:-https://huggingface.co}: check the network, the name, and HF_TOKEN if it is gated${reason:+ ($reason)}"
}

benchmark() { # NAME
    local file=data/eval/$1.json source
    if [[ -f $file ]] && python3 scripts/convert_benchmark.py check "$1" "$file"; then return; fi
    source=$(python3 scripts/convert_benchmark.py source "$1")
    fetch dataset "${source%% *}" "data/raw/$1" --include "${source#* }" >/dev/null
    python3 scripts/convert_benchmark.py convert "$1" "data/raw/$1" "$file" || die 1 "$1 was fetched into data/raw/$1 but not taken (see the line above)"
}

[[ $# -ge 2 ]] || usage
kind=$1 name=$2
command -v hf >/dev/null || die 2 "no hf command: run bash examples/quickstart.sh or pip install huggingface_hub"
case $kind:$name in
model:?*/?*) fetch model "$name" "models/${name##*/}" "${@:3}" && echo "$PWD/models/${name##*/}" ;;
data:?*/?*) fetch dataset "$name" "data/${name##*/}" "${@:3}" && echo "$PWD/data/${name##*/}" ;;
data:*)
    [[ $name == all ]] && names=$BENCHMARKS || names=${*:2}
    for name in $names; do [[ " $BENCHMARKS " == *" $name "* ]] || usage; done
    for name in $names; do benchmark "$name"; done
    ;;
*) usage ;;
esac
