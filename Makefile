# make run [MODELS=a,b]   make up [LLM=local]   make test   make heavy   make check   make bench   make clean
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
MODELS ?=
WORKERS ?= 2
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check
INSTALLED = .venv/.installed
CPU_TORCH = import json, platform, sys; t = [i for i in json.load(sys.stdin)["install"] if i["metadata"]["name"] == "torch"]; \
	v = t[0]["metadata"]["version"] if t else "+cpu"; \
	sys.exit(sys.platform == "linux" and platform.machine() == "x86_64" and not v.endswith("+cpu"))

.PHONY: run up test heavy check bench screenshots clean help

help:
	@echo 'make run     build, measure, gate and release the sample corpus: ends with a table of MRR per model (MODELS=a,b picks models)'
	@echo 'make up      the whole platform: Dagster, MLflow, the embedding service, the query service; Ctrl-C stops it (LLM=local: a language model too)'
	@echo 'make test    the tests, on WORKERS=2 processes'
	@echo 'make heavy   the tests that take minutes, with the figures they measure'
	@echo 'make check   lint, format, types, layers and dependencies'
	@echo 'make bench   measured comparisons'
	@echo 'make screenshots   the pictures in docs/images, from a running Dagster UI'
	@echo 'make clean   remove .venv and caches; built snapshots and the database in .ragline stay'

run: $(INSTALLED)
	.venv/bin/ragline run $(if $(MODELS),--models $(MODELS))

up: $(INSTALLED)
	@test -z '$(LLM)' || $(PIP) -c constraints.txt -e '.[local-llm]'
	.venv/bin/ragline up $(if $(LLM),--llm $(LLM))

test: $(INSTALLED)
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

heavy: $(INSTALLED)
	.venv/bin/python -m pytest -m heavy -rA

check: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/deptry .

bench: $(INSTALLED)
	.venv/bin/python -m evals.bench

screenshots: $(INSTALLED)
	.venv/bin/python docs/screenshots.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# torch comes first and alone: on Linux a CUDA build and its libraries are several GB, so one is refused before it is downloaded.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'No Python 3.11, 3.12 or 3.13 with venv here. Install one, or name it: make PYTHON=/path/to/python3.12'; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv (once; a few minutes)'
	@$(PIP) --dry-run --no-deps --report - -c constraints.txt torch | .venv/bin/python -c '$(CPU_TORCH)' || test -n '$(ALLOW_CUDA)' || { \
		echo 'pip offers a CUDA build of torch here (several GB). Make pip find the CPU build (its find-links or extra-index-url setting)'; \
		echo 'and try again, or accept it with ALLOW_CUDA=1.'; exit 1; }
	@$(PIP) -c constraints.txt torch
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
