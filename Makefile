# Every target installs what it needs into .venv, once; a change of the versions installs again.
.PHONY: quickstart test check audit install dev clean
BIN := .venv/bin
VERSIONS := pyproject.toml constraints.txt scripts/install.sh
# Tests run in so many processes, each with one thread of torch's; one more than cores, since tests often wait.
JOBS ?= $(shell (nproc || sysctl -n hw.ncpu || echo 2) 2>/dev/null | awk '{print ($$1 < 7) ? $$1 + 1 : 8}')
export PYTHON

quickstart: .venv/.installed-run ## run the quickstart study; takes it up where it stopped
	$(BIN)/sweep run studies/quickstart.yaml

test: .venv/.installed-dev ## the tests but the slow ones; ARGS="-m slow" for those, JOBS=0 in one process
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

check: .venv/.installed-dev ## style, types and the walls between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: .venv/.installed-dev ## known vulnerabilities of the pinned versions, where an index of them can be reached
	$(BIN)/python scripts/audit.py

install: .venv/.installed-run

dev: .venv/.installed-dev

.venv/.installed-run: $(VERSIONS)
	scripts/install.sh run

.venv/.installed-dev: $(VERSIONS)
	scripts/install.sh dev

clean: ## what tools left behind; studies and .venv stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find sweep tests -name __pycache__ -type d -prune -exec rm -rf {} +
