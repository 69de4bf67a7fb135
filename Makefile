# Each target works as the only command after a clone; `.ci/venv` makes .venv once and does nothing afterwards.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench test-peft test-page test-slurm test-container venv clean

demo: venv
	@$(BIN)/python -m demo.run

test: venv
	@bash .ci/test

lint: venv
	@bash .ci/lint

# Every result file of benchmarks/results, with the settings of the committed ones; hours on two cores.
bench: venv
	@$(BIN)/python benchmarks/manifold_step.py --runs 7 --threads 2 --out benchmarks/results/manifold_step_cpu.json
	@$(BIN)/python benchmarks/step_overhead.py --runs 4 --steps 3 --length 128 --out benchmarks/results/step_overhead_cpu.json
	@$(BIN)/python benchmarks/manifold_comm.py --out benchmarks/results/manifold_comm.json
	@$(BIN)/python benchmarks/manifold_step_distributed.py --runs 7 --out benchmarks/results/manifold_step_distributed_cpu.json
	@$(BIN)/python benchmarks/convergence.py --out benchmarks/results/convergence_cpu.json
	@$(BIN)/python benchmarks/adaptive_ranks.py --layers 6 --threads 1 --runs 3 --out benchmarks/results/adaptive_ranks_cpu.json
	@$(BIN)/python benchmarks/live_spectrum.py --steps 6 --runs 5 --out benchmarks/results/live_spectrum_cpu.json
	@$(BIN)/python benchmarks/resume_soak.py --kills 20 --steps 200 --seed 0 --out benchmarks/results/resume_soak.json
	@$(BIN)/python benchmarks/slurm_preemption.py --preemptions 20 --seed 0 --out benchmarks/results/slurm_preemption.json
	@$(BIN)/python benchmarks/eval_throughput.py --problems 96 --runs 3 --out benchmarks/results/eval_throughput_cpu.json
	@$(BIN)/python -m benchmarks.readme

# The report's page in Debian's chromium: sorting, widths, pictures of it in build/page to look at.
test-page: venv
	@$(BIN)/python -m tests.browser.check_report

test-peft: venv
	@$(BIN)/python tests/peft_suite/run.py

# A SLURM of two nodes on this machine; needs root and Debian's packages, and says so where it cannot run.
test-slurm: venv
	@bash .ci/slurm

# Both images on CPU bases and what runs in them; needs root and Debian's packages, and says so where it cannot run.
test-container: venv
	@bash .ci/container

venv:
	@PYTHON=$(PYTHON) bash .ci/venv

clean:
	rm -rf .venv .cache build polar.egg-info
