# make quickstart   venv, text, tokenizer, shards, a low-rank model without and with restarts, report, export
# make test         venv, the tests but the long ones (clusters, kill loops, more cases), on JOBS cores (2)
# make test-all     all of them; SLURM, pdsh and network namespaces where they are installed
# make docs         the documentation as a site in site/, which opens without a network
# make lint         ruff, mypy, the order of imports between rooms, the rules of tests/rules.py, docs
#
# PYTHON=python3.12 chooses the interpreter of the venv; INPUT='path/*.json.gz' gives the quickstart
# your own text; ARGS='...' goes to pytest or, as section.key=value, to the quickstart's training.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
INSTALLED := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv quickstart test test-all docs lint

venv: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else \
	  "error: Python %d.%d: need 3.10, 3.11 or 3.12; name one with make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time this takes minutes (PyTorch is large)."
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,mpi]'
	touch $@

quickstart: $(INSTALLED)
	$(VENV)/bin/python tools/quickstart.py $(ARGS) $(if $(INPUT),--input $(foreach FILES,$(INPUT),'$(FILES)'))

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m 'not long' $(ARGS)

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(ARGS)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html; searching needs a server: $(VENV)/bin/python -m http.server --directory site"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy megalr
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m tests.rules
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --site-dir $(VENV)/site
