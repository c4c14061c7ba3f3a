#!/usr/bin/env bash
# Fetches a model into ./models or a data set into ./data of the repository; run it again to continue or update.
#   bash download.sh model JetLM/SDAR-8B-Chat
#   bash download.sh data HuggingFaceH4/MATH-500
# Extra arguments go to `hf download`. HF_TOKEN (gated repositories) and HF_ENDPOINT (mirrors) are read from the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ ! -x .venv/bin/hf ]] || PATH="$PWD/.venv/bin:$PATH"

usage() { echo "usage: bash download.sh model|data OWNER/NAME [hf download options]" >&2 && exit 2; }
[[ $# -ge 2 && $2 == ?*/?* ]] || usage
case $1 in
model) folder=models type=model ;;
data) folder=data type=dataset ;;
*) usage ;;
esac
command -v hf >/dev/null || { echo "download.sh: no hf command: run bash examples/quickstart.sh or pip install huggingface_hub" >&2 && exit 2; }

repo=$2
hf download "$repo" --repo-type "$type" --local-dir "$folder/${repo##*/}" "${@:3}" || {
    echo "download.sh: could not fetch $repo from ${HF_ENDPOINT:-https://huggingface.co}: check the network, the name, and HF_TOKEN if it is gated" >&2
    exit 1
}
echo "$PWD/$folder/${repo##*/}"
