# Everything runs in .venv, which the first target that needs it sets up from pyproject.toml and constraints.txt. Needs
# only make and Python 3.11 or newer; once .venv is there, no network and no active environment.

PYTHON ?= python3
ARGS ?=
# A further index with a CPU build of torch, asked only when pip's configured sources have none. Empty: ask nowhere.
TORCH_INDEX ?=

# pip before 25.3 lets PIP_CONSTRAINT into isolated builds, later ones want PIP_BUILD_CONSTRAINT. As file URLs, because
# pip splits these variables at spaces.
space := $(subst ,, )
HERE := file://$(subst $(space),%20,$(CURDIR))
export PIP_CONSTRAINT := $(HERE)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(HERE)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_WAIT_POLICY := passive
export MPLBACKEND := Agg
unexport PYTHONPATH PYTHONHOME

# -P keeps the current folder off sys.path: linalg/, implicit/, ... are packages under nestopt alone, never bare.
RUN := .venv/bin/python -P
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# $(call install_torch,python): the CPU build where this is Linux, unless that python has the pinned torch in any build.
# Elsewhere, and where no CPU build can be had, the next `pip install` takes what it finds.
define install_torch
if [ "$$(uname -s)" = Linux ] && ! $(1) -c 'import importlib.metadata as m; assert m.version("torch").split("+")[0] == "$(TORCH)"' 2>/dev/null; then \
	$(1) -m pip -qq install --no-compile 'torch==$(TORCH)+cpu' 2>/dev/null || \
	{ [ -n '$(TORCH_INDEX)' ] && $(1) -m pip -qq install --no-compile --retries 1 --timeout 20 --extra-index-url '$(TORCH_INDEX)' 'torch==$(TORCH)+cpu'; } || \
	echo 'No CPU build of torch $(TORCH) found: taking the default build.' >&2; \
fi
endef

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint doctest layers format examples bench wheel-test clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name what; do printf '  make %-11s %s\n' "$$name" "$$what"; done
	@echo 'Variables: PYTHON=python3.12 (used for a new .venv), ARGS="..." (handed to pytest), TORCH_INDEX=url'

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nestopt needs Python 3.11 or newer: make PYTHON=...")'
	@echo 'Setting up .venv (once, a minute or two)' >&2
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(call install_torch,.venv/bin/python)
	@.venv/bin/python -m pip -qq install --no-compile --editable '.[dev,layers,plot,test]'
	@touch $@

demo: .venv/.installed  ## learn the hyperparameters of two models on real data
	@$(RUN) examples/hyperparameter_optimization.py

test: .venv/.installed  ## the tests, on two cores, but for the slow ones (the doctests: make lint)
	@$(RUN) -m pytest -q -n 2 -m 'not slow' tests $(ARGS)

slow: .venv/.installed  ## the slow tests
	@$(RUN) -m pytest -q -n 2 -m slow tests $(ARGS)

lint: .venv/.installed  ## ruff, mypy --strict and the doctests
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(MAKE) --no-print-directory doctest

doctest: .venv/.installed  ## the examples in docstrings
	@$(RUN) -m pytest -q -n 2 src/nestopt

layers: .venv/.installed  ## the imports point one way: linalg <- implicit <- constrained <- bilevel
	@$(RUN) -m pytest -q tests/test_layers.py

format: .venv/.installed  ## let ruff write what it can
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

examples: .venv/.installed  ## every example, in its quick mode
	@set -e; root=$$(pwd); out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	for file in examples/*.py; do \
		echo "$$file"; \
		(cd "$$out" && NESTOPT_QUICK=1 NESTOPT_OUTPUT="$$out" "$$root/.venv/bin/python" "$$root/$$file"); \
	done

bench:  ## list the benchmarks and how to run one
	@echo 'make bench only lists. Install the peers with: .venv/bin/python -m pip install -c constraints.txt ".[bench]"'
	@for file in benchmarks/*.py; do if [ -e "$$file" ]; then echo "  .venv/bin/python $$file"; fi; done

# The sdist's wheel equals the tree's; it is installed into an empty environment with the oldest versions that
# pyproject.toml admits and PyPI's `implicit`; the tests, but for the laws over lists of instances, which see the same
# code in `make test`, run in a folder that holds none of the library's source.
wheel-test: pyproject.toml constraints.txt constraints-floor.txt  ## the tests against the wheel, in a clean environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nestopt needs Python 3.11 or newer: make PYTHON=...")'
	@set -e; root=$$(mktemp -d); trap 'rm -rf "$$root"' EXIT; \
	mkdir "$$root/tree" "$$root/empty" "$$root/checks"; \
	tar -cf - --exclude=./.venv --exclude=./.git --exclude=./build --exclude=./dist --exclude='*.egg-info' --exclude=__pycache__ . | tar -xf - -C "$$root/tree"; \
	sed 's/[[:space:]]*#.*//' constraints-floor.txt constraints.txt | awk -F== 'NF && !seen[tolower($$1)]++' >"$$root/tree/constraints.txt"; \
	export PIP_CONSTRAINT="file://$$root/tree/constraints.txt" PIP_BUILD_CONSTRAINT="file://$$root/tree/constraints.txt"; \
	echo 'Building the sdist, its wheel, and the wheel of the tree'; \
	$(PYTHON) -m venv "$$root/build"; \
	"$$root/build/bin/python" -m pip -qq install --no-compile setuptools; \
	(cd "$$root/tree" && "$$root/build/bin/python" -c 'import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])' "$$root/dist" >/dev/null); \
	"$$root/build/bin/python" -m pip -qq wheel --no-deps --wheel-dir "$$root/from-sdist" "$$root"/dist/*.tar.gz; \
	"$$root/build/bin/python" -m pip -qq wheel --no-deps --wheel-dir "$$root/from-tree" "$$root/tree"; \
	"$$root/build/bin/python" -c 'import sys, zipfile; a, b = ({i.filename: i.CRC for i in zipfile.ZipFile(w).infolist() if ".dist-info/" not in i.filename} for w in sys.argv[1:]); sys.exit(a != b and f"wheels differ: {sorted(a.items() ^ b.items())}")' "$$root"/from-sdist/*.whl "$$root"/from-tree/*.whl; \
	echo 'Installing it with the floors, beside implicit from PyPI'; \
	$(PYTHON) -m venv "$$root/venv"; python="$$root/venv/bin/python"; \
	$(call install_torch,"$$python"); \
	wheel=$$(echo "$$root"/from-sdist/*.whl); \
	"$$python" -m pip -qq install --no-compile "$$wheel[layers,plot,test]" implicit; \
	"$$python" -m pip check; \
	(cd "$$root/empty" && "$$python" -c 'import implicit, nestopt.implicit as ours; assert implicit.als and implicit is not ours; assert "site-packages" in ours.__file__, ours.__file__'); \
	for item in tests examples benchmarks *.md *.toml *.txt; do if [ -e "$$item" ]; then cp -R "$$item" "$$root/checks"; fi; done; \
	cd "$$root/checks"; "$$python" -P -m pytest -q -n 2 -m 'not slow' -k 'not duty and not laws and not needs_no_tuning' -o pythonpath= -o testpaths=tests $(ARGS)

clean:  ## remove what builds and checks left (.venv stays)
	@rm -rf build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache src/*.egg-info docs/_build docs/gallery
	@find . -path ./.venv -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
