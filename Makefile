# "make demo" and "make test" do all the set-up themselves; Python (3.11 or newer) is all they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test bench-cpu bench-gpu clean

demo: setup
	$(BIN)/python benchmarks/demo.py

# A process of tests per core, each of up to two gigabytes. On slow machines some of the slow tests
# are skipped, so that all is over within half an hour.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal \
		--slow-until 17

bench-cpu: setup
	$(BIN)/python benchmarks/resnet_memory.py
	$(BIN)/python benchmarks/resnet_speed.py
	$(BIN)/python benchmarks/digits_accuracy.py
	$(BIN)/python benchmarks/patch_memory.py
	$(BIN)/python benchmarks/patch_speed.py
	$(BIN)/python benchmarks/patch_accuracy.py
	$(BIN)/python benchmarks/compression_memory.py
	$(BIN)/python benchmarks/compression_quality.py
	$(BIN)/python benchmarks/compression_speed.py
	$(BIN)/python benchmarks/compression_accuracy.py
	$(BIN)/python benchmarks/conversion_memory.py
	$(BIN)/python benchmarks/conversion_speed.py
	$(BIN)/python benchmarks/pair_accuracy.py
	$(BIN)/python benchmarks/speed.py --device cpu --minutes 12
	$(BIN)/python benchmarks/translation_memory.py
	$(BIN)/python benchmarks/translation_speed.py
	$(BIN)/python benchmarks/translation_accuracy.py
	$(BIN)/python benchmarks/saving_speed.py

# Nine minutes on one GPU. Segments that grow leave no holes between the tensors of many settings.
bench-gpu: export PYTORCH_ALLOC_CONF = expandable_segments:True
bench-gpu: setup
	$(BIN)/python benchmarks/bandwidth.py
	$(BIN)/python benchmarks/fused_kernels.py
	$(BIN)/python benchmarks/speed.py --device cuda --minutes 5
	$(BIN)/python benchmarks/memory.py --minutes 2

# Installed anew only when the requirements have changed.
setup:
	@cmp -s pyproject.toml .venv/installed.toml || { \
		$(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --quiet --editable ".[dev]" && \
		cp pyproject.toml .venv/installed.toml; }

clean:
	rm -rf .venv
