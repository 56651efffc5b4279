# `make demo` and `make test` do all their set-up themselves, in .venv; `make PYTHON=... ` chooses the Python.

.PHONY: demo test suite test-fast test-gpu lint venv clean
.DELETE_ON_ERROR:

ifndef PYTHON
PYTHON := $(shell scripts/newest_python.sh)
endif
BIN := .venv/bin
# What is never imported need not be compiled: half a minute less.
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile

demo: .venv/run.stamp
	$(BIN)/wisparse demo

# The checkers keep one core busy for a minute, beside the tests.
test: .venv/dev.stamp
	@$(MAKE) --no-print-directory -j 2 lint suite

suite: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -rs

# What a change of a method needs; the second run finds the first one's programs.
FAST := tests/calibration tests/evaluation tests/search/test_losses.py tests/search/test_greedy_and_exponents.py \
	tests/search/test_methods.py tests/search/test_verdict.py tests/sparsity/test_budget.py tests/sparsity/test_plan.py \
	tests/sparsity/test_score.py tests/kernels/test_sparse_linear.py tests/kernels/test_threshold.py

test-fast: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(FAST)

test-gpu: .venv/gpu.stamp
	$(BIN)/python -m pytest -q tests/gpu tests/kernels tests/models/test_decode.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error

venv: .venv/dev.stamp

# The Python that .venv was made with, so that another PYTHON makes it anew.
.venv/python.stamp: FORCE
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found that starts and has ensurepip (on Debian and Ubuntu: apt install python3-venv); name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
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
	@$(INSTALL) -e '.[dev,eval]'
	@touch $@ .venv/run.stamp

.venv/gpu.stamp: .venv/dev.stamp
	@echo "installing jax for CUDA"
	@$(INSTALL) -e '.[dev,eval,cuda]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

FORCE:
