# Each target works as the only command after a clone; `.ci/venv` makes .venv once and does nothing afterwards.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench test-peft venv clean

demo: venv
	@$(BIN)/python -m demo.run

test: venv
	@bash .ci/test

lint: venv
	@bash .ci/lint

bench: venv
	@$(BIN)/python benchmarks/manifold_step.py --out benchmarks/results/manifold_step.json
	@$(BIN)/python benchmarks/step_overhead.py --out benchmarks/results/step_overhead.json

test-peft: venv
	@$(BIN)/python tests/peft_suite/run.py

venv:
	@PYTHON=$(PYTHON) bash .ci/venv

clean:
	rm -rf .venv .cache build polar.egg-info
