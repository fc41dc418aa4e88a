# make help lists the targets. Everything runs from .venv, which is made on first use and refreshed when
# pyproject.toml or constraints.txt change.

PYTHON = python3
BIN = .venv/bin
READY = .venv/.ready
OLDEST = .venv-oldest/bin/python

# One thread for each worker: the test suite runs two of them, and oversubscribed BLAS is many times slower.
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install demo test doctest lint types notebooks bench tables check oldest clean

help:
	@echo "make install    make .venv with the library, every extra and the development tools"
	@echo "make demo       extract an adapter from a real fine-tuning, merge it, attach it, train on (demo-output/)"
	@echo "make test       run the tests and the doctests"
	@echo "make lint       check style and formatting"
	@echo "make types      check types"
	@echo "make notebooks  execute the notebooks and check that they are stored without outputs"
	@echo "make bench      run the benchmark programs on small sizes"
	@echo "make tables     measure the tables of the README anew, on one thread"
	@echo "make check      all of the above except the demo and the tables"
	@echo "make oldest     run the core's tests on the oldest NumPy, SciPy, … that are allowed, without PyTorch and JAX"
	@echo "make clean      remove what the other targets left, except .venv"

install: $(READY)

# pip installs dependency groups since 25.1, so pip itself comes first.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
		--editable '.[all]' --group dev
	touch $(READY)

demo: $(READY)
	$(BIN)/flora-tensor demo

test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --quiet
	$(MAKE) doctest

doctest: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest --quiet --doctest-modules --doctest-glob=README.md \
		flora_tensor backends/flora_torch README.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

notebooks: $(READY)
	$(ONE_THREAD) $(BIN)/python tests/run_notebooks.py notebooks

bench: $(READY)
	@for program in tests/benchmarks/*.py; do \
		echo "== $$program --small"; \
		$(ONE_THREAD) $(BIN)/python "$$program" --small || exit 1; \
	done

tables: $(READY)
	$(ONE_THREAD) $(BIN)/flora-tensor demo
	$(ONE_THREAD) $(BIN)/python tests/benchmarks/extraction_quality.py
	$(ONE_THREAD) $(BIN)/python tests/benchmarks/decompositions.py --threads 1
	$(ONE_THREAD) $(BIN)/python tests/benchmarks/real_deltas.py --threads 1
	$(ONE_THREAD) $(BIN)/python tests/benchmarks/layers.py --threads 1 --rank 16
	$(ONE_THREAD) $(BIN)/python tests/benchmarks/layers.py --threads 1 --models
	$(ONE_THREAD) $(BIN)/python tests/benchmarks/extraction.py

check: lint types test notebooks bench

# An environment of its own, made anew each time, with what the core needs and what its tests compare it with.
oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST) -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(OLDEST) -m pip install --quiet --constraint constraints-oldest.txt --build-constraint constraints.txt \
		--editable '.[tensorly,viz]' pytest pytest-xdist hypothesis einops array-api-strict ml-dtypes
	$(ONE_THREAD) $(OLDEST) -m pytest -n 2 --quiet

clean:
	rm -rf build dist demo-output .pytest_cache .ruff_cache .hypothesis
	find flora_tensor backends tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
