# Two commands for a new user: `make demo` and `make test`. Each target builds .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BENCH := kernels/benchmarks
MODEL_BENCHMARKS := bench_train_step bench_losses bench_loss_memory
DATA_BENCHMARKS := data_prepare data_verify data_memory
# Processes that run the tests.
WORKERS ?= 2
# A small model gains from a second thread on free cores; on busy ones its threads wait for each other, so tests use one.
demo: export OMP_NUM_THREADS ?= 2
test test-slow test-versions test-gpu: export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slow test-versions test-harness test-vllm test-trackers check-full-size wheelhouse lint docs bench gpu test-gpu bench-gpu
.PHONY: gpu-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "sambay-sft is installed in .venv; try: $(BIN)/sft doctor"

demo: $(STAMP)
	$(BIN)/sft run --config configs/tiny/recipe.yaml

# A file's tests stay together, since many of them share what the first one makes; the folders with long ones come first.
test: lint
	$(BIN)/python -m pytest -m "not gpu and not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What takes minutes a test: a hundred killed preparations, ten thousand hostile answers.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

# The whole chain at the published size within 12 GiB and 15 minutes; leave both cores and 35 GB of disk to it.
check-full-size: $(STAMP)
	$(BIN)/python tests/full_size.py $(ARGS)

# Model, kernels and trainer on the oldest and the newest packages that pyproject.toml allows, each in an environment of
# its own in .versions/: minutes to install, and gigabytes where torch comes with CUDA only.
test-versions:
	$(PYTHON) tests/versions.py $(VERSIONS_ARGS)

# lm-evaluation-harness on an export, in an environment of its own in .versions/.
test-harness: $(STAMP)
	$(BIN)/python tests/harness.py $(ARGS)

# The plug-in of serve/ in vLLM's CPU build, in an environment of its own in .versions/: minutes to install, 3.5 GB.
# make test-vllm ARGS="chunks server" for some; leave both cores to it.
test-vllm: $(STAMP)
	$(BIN)/python tests/in_vllm/run.py $(ARGS)

# Weights & Biases and MLflow, which stay out of .venv: with them every process that trains takes a second more to begin.
test-trackers: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade --target .versions/trackers wandb mlflow-skinny sqlalchemy alembic
	PYTHONPATH=$(CURDIR)/.versions/trackers $(BIN)/python -m pytest tests/integration/test_trackers.py

# For a machine without internet: make wheelhouse PYTHON=3.12 HAVE=requirements-of-the-image.txt [EXTRAS=cuda] [OUT=wheelhouse]
# PYTHON is the image's version here, and not what .venv is made with.
wheelhouse: export PYTHON_OF_IMAGE := $(if $(filter 3.%,$(PYTHON)),$(PYTHON),3.12)
wheelhouse:
	$(MAKE) --no-print-directory PYTHON=python3 setup
	$(BIN)/python tools/wheelhouse.py --python "$$PYTHON_OF_IMAGE" $(if $(HAVE),--have "$(HAVE)") $(if $(EXTRAS),--extras "$(EXTRAS)") \
		$(if $(OUT),--out "$(OUT)")

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site, in site/; python -m http.server -d site shows it, with its search.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/python tools/recipe_reference.py
	$(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python $(BENCH)/bench_ops.py --device cpu --out $(BENCH)/results
	@for name in $(MODEL_BENCHMARKS) $(DATA_BENCHMARKS); do echo "== $$name"; $(BIN)/python $(BENCH)/$$name.py || exit 1; done

# A GPU target without a GPU fails: a run that skipped everything would look like one that passed.
gpu: $(STAMP)
	@$(BIN)/python -c "import sys, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; \
	sys.exit('no CUDA device: this target needs one') if n == 0 else \
	print(*(f'{i}: {torch.cuda.get_device_name(i)}, compute capability {torch.cuda.get_device_capability(i)}' for i in range(n)), sep='\n')"

# Whether a GPU is in order, in minutes: every op against float64, its speed, a short real training.
gpu-check: gpu
	$(BIN)/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)
	$(BIN)/python $(BENCH)/bench_ops.py --device cuda --out $(BENCH)/results
	$(BIN)/sft run --config configs/tiny/recipe.yaml --output_dir runs/gpu-check --stage midtrain \
		--stages.midtrain.data.sources.0.generate.rows 1500 --stages.midtrain.data.sources.1.generate.rows 100 \
		--defaults.evaluate.suites.0.source.generate.rows 60

test-gpu: gpu
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench-gpu: gpu
	$(BIN)/python $(BENCH)/bench_ops.py --device cuda --out $(BENCH)/results
	$(BIN)/python $(BENCH)/published_step.py --device cuda --out $(BENCH)/results/published-step.json
	$(BIN)/sft bench generate --size published --device cuda --protocol paper --requests 1 4 16 --beside llama llama-graph \
		--out $(BENCH)/results/published-decode.json
	@for name in $(MODEL_BENCHMARKS); do echo "== $$name"; \
	$(BIN)/python $(BENCH)/$$name.py --device cuda --out $(BENCH)/results/$$name-gpu.json || exit 1; done

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site
