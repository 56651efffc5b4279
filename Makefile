# `make demo` and `make test` do all their set-up themselves, in .venv; `make PYTHON=... ` chooses the Python.

.PHONY: demo test suite test-gpu lint venv clean
.DELETE_ON_ERROR:

# The newest supported Python that starts: a name on the PATH may be a stub that does not.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	"$$p" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
	&& { command -v "$$p"; break; }; done)
BIN := .venv/bin
# What is never imported need not be compiled: half a minute less.
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile

demo: .venv/run.stamp
	$(BIN)/wisparse demo

# The checkers keep one core busy for a minute, beside the tests.
test: .venv/dev.stamp
	@$(MAKE) --no-print-directory -j 2 lint suite

suite: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-gpu: .venv/gpu.stamp
	$(BIN)/python -m pytest -q tests/gpu tests/kernels tests/models/test_decode.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

venv: .venv/dev.stamp

# The Python that .venv was made with, so that another PYTHON makes it anew.
.venv/python.stamp: FORCE
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found that starts; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
		{ echo "$(PYTHON): expected a Python 3.11, 3.12 or 3.13 that starts" >&2; exit 1; }
	@made="$$("$(PYTHON)" -c 'import sys; print(sys.executable, sys.version)')"; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$made" ]; then \
		echo "making .venv with $(PYTHON)"; rm -rf .venv; \
		"$(PYTHON)" -m venv .venv || { rm -rf .venv; echo "python's venv module failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
		echo "$$made" > $@; \
	fi

.venv/run.stamp: .venv/python.stamp pyproject.toml
	@echo "installing the package"
	@$(INSTALL) -e .
	@touch $@

.venv/dev.stamp: .venv/python.stamp pyproject.toml
	@echo "installing the package and its development tools"
	@$(INSTALL) -e '.[dev]'
	@touch $@ .venv/run.stamp

.venv/gpu.stamp: .venv/dev.stamp
	@echo "installing jax for CUDA"
	@$(INSTALL) -e '.[dev,cuda]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

FORCE:
