# Needs only Python 3.10 to 3.13 and make. `make demo` and `make test` install what they need into .venv first;
# what the tests need besides, Chromium and curl, `make system` installs from the system's packages.
PYTHON ?= python3
BIN := .venv/bin

# Tests start many processes, each of which would otherwise compile anew whatever has no bytecode yet.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install system policy demo test docs matrix lint types audit bench clean

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and "Python 3.10 to 3.13 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[serve,train,gateway,openvino,demo,test,bench,models,docs,lint]'
	$(call compiled,.venv/lib)
	touch $@

# pip compiles on one core, which takes more than half of an installation, and a third of that is code which nothing
# here imports: the packages' own tests, and models of transformers. What cannot be compiled stays as it is, as with pip.
compiled = $(BIN)/python -m compileall -qq --workers 0 -x '/tests?/|/transformers/models/' $(1) || true

# What judges the manifests of Kubernetes wants other versions of packages than TorchServe, so it has a folder of its own.
policy: .venv/checkov/installed

.venv/checkov/installed: constraints-checkov.txt | .venv/bin/python
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/python -m pip install --quiet --no-compile --requirement constraints-checkov.txt
	$(call compiled,.venv/checkov/lib)
	touch $@

system:
	command -v curl || $(call installed,curl)
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(call installed,chromium)

installed = { test "$$(id -u)" = 0 && apt-get update && apt-get install --yes --no-install-recommends $(1); } || \
	{ echo "The tests need $(1), and it could not be installed here: install your system's package of it." >&2; exit 1; }

demo: install
	$(BIN)/python -m tests.demo

test:
	$(MAKE) --jobs=2 install policy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The pages that are made from the code are written first; a test says when the committed ones are not up to date.
docs: install
	$(BIN)/python -m tests.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Which Pythons are tried depends on those that uv finds or can fetch. Each environment is deleted after its tests.
matrix: .venv/uv/bin/uv
	$(BIN)/python -m tests.matrix --uv $<

.venv/uv/bin/uv: | .venv/installed
	$(PYTHON) -m venv .venv/uv
	.venv/uv/bin/python -m pip install --quiet uv==0.13.9

lint: types audit

types: install
	mkdir -p .typing && ln -sfn .. .typing/early_exit
	$(BIN)/ruff check .
	$(BIN)/mypy -p early_exit.handler -p early_exit.training -p early_exit.archiver

# By itself pip-audit passes over packages that PyPI, or a mirror, tells nothing about, and finds no hole in them.
audit: .venv/audit/installed
	.venv/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt \
		$(shell sed -n 's/^\([A-Z][A-Z0-9-]*\) .*/--ignore-vuln \1/p' ignored-advisories.txt)

.venv/audit/installed: constraints-audit.txt | .venv/installed
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --requirement constraints-audit.txt
	touch $@

RESULTS := docs/results
MEASURED := loop int8 overhead engine answers search certify dependence drift recovery coverage roll fuzz habits gpu
NETWORKS := resnet18-full resnet50 resnet56 efficientnet vit mobilefacenet dlrm mask-rcnn

# Each benchmark once, then the page of all. For each network, both promises that the paper's figures are compared with,
# and the paper's rules, in a run of its own; on one small network every method, with every budget and number of layers.
# Fewer trials, or heads that are not searched, keep the training of a large network below an hour.
bench: install
	$(BIN)/python -m tests.demo --json $(RESULTS)/demo.json
	for name in $(MEASURED); do \
		$(BIN)/python -m tests.benchmarks.$$name --json $(RESULTS)/$$name.json || exit; done
	for name in $(NETWORKS); do \
		trials=20; methods="certified certified-papers-loss paper"; \
		case $$name in efficientnet|dlrm|mask-rcnn) trials=3;; \
			resnet50) methods="no-replay no-replay-papers-loss";; esac; \
		$(BIN)/python -m tests.benchmarks.paper --json $(RESULTS)/paper-$$name.json --subjects $$name \
			--budgets 0.02 --trials $$trials --methods $$methods || exit; done
	$(BIN)/python -m tests.benchmarks.paper --json $(RESULTS)/methods.json --subjects resnet18
	$(BIN)/python -m tests.benchmarks.page

clean:
	rm -rf .venv .typing build site *.egg-info
