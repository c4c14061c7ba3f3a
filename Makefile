# Uses .venv when scripts/test.sh or examples/quickstart.sh has made it.
export PATH := $(if $(wildcard .venv/bin),$(CURDIR)/.venv/bin:)$(PATH)

.PHONY: check test format

check:
	ruff check .
	ruff format --check .
	mypy
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 WANDB_MODE=offline python3 -m pytest -m "not slow and not matrix and not chaos and not gpu and not lmdeploy"

test:
	bash scripts/test.sh

format:
	ruff check --fix .
	ruff format .
