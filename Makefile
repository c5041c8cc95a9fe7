# make demo: install, and run the whole pipeline on a toy world. make test: install, and run every check.
# make test-faults: what those leave out, for its length.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test files that run at a time; many of their tests are two or four processes themselves.
JOBS ?= 2
# Named in the install command itself, so that nothing newer (and much larger) is ever chosen first.
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo demo-full gsm8k test test-faults test-kills install format clean

demo: install
	$(BIN)/gearshift demo

# The same with all seven systems of the paper; about twice as long.
demo-full: install
	$(BIN)/gearshift demo --full

# Every stage on real text: make gsm8k DATA=folder (configs/gsm8k-cpu/README.md says what is in it).
gsm8k: install
	$(BIN)/python configs/gsm8k-cpu/prepare.py "$(DATA)" runs/gsm8k/data
	$(BIN)/gearshift pretrain configs/gsm8k-cpu/pretrain.yaml
	$(BIN)/gearshift sft configs/gsm8k-cpu/sft.yaml
	$(BIN)/gearshift reward configs/gsm8k-cpu/reward.yaml
	$(BIN)/gearshift sft configs/gsm8k-cpu/flan.yaml
	$(BIN)/gearshift sft configs/gsm8k-cpu/t0.yaml
	$(BIN)/gearshift ppo configs/gsm8k-cpu/ppo.yaml
	$(BIN)/gearshift ppo configs/gsm8k-cpu/ppo-ptx.yaml
	$(BIN)/gearshift compare configs/gsm8k-cpu/compare.yaml
	$(BIN)/gearshift report runs/gsm8k

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist loadfile --durations=15

# Processes killed at points of a save, full disks: what a checkpoint promises. Minutes.
test-faults: install
	$(BIN)/pytest tests/faults --durations=0

# A kill at every write point of a save, and fifty at random moments of one run. Half an hour.
test-kills: install
	STRIDE=1 $(BIN)/pytest -s tests/faults/kills.py tests/faults/test_killed.py

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard gearshift/kernels/native/*.c)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)" -e ".[test]"
	touch $@

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
