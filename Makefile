# make demo: everything, on the built-in data set. make test: the tests. make faults: many kills and broken files.
# All make their own environment in .venv first.
# make tables DATASET=coco: six methods, three seeds, tables and plots of a cached data set; results/coco/README.md shows all.
# make ablation DATASET=coco: the variants too, and one table of all; what is trained already is not trained again.
# RESUME=--overwrite trains all of it anew.
# make zero-shot: classes of the built-in world from uncertain prompts, by heads trained on shapes.
# make gpu: on a machine with a GPU, checks and measures everything there in eight minutes; without one, a short trial.
# make fair DATASET=coco: the baselines also as their own authors build and rank them, one table, and whose leads survive.
PYTHON ?= python3
RESUME ?= --resume
CONSTRAINTS ?= -c tests/constraints.txt
DATASET ?= shapes
SEEDS ?= 0 1 2
RECIPE ?= $(if $(filter shapes,$(DATASET)),small,paper)
# Of the original recipes, as published; thousands of epochs are out of reach for a small machine.
ORIGINAL_EPOCHS ?= $(if $(filter shapes,$(DATASET)),25)
BASELINES := probvlm pfe pcmepp prolip
ORIGINALS := probvlm-original probvlm-original-default-weight pfe-original pcmepp-original prolip-original
BIN := .venv/bin
RUN := $(BIN)/python
# What a CPU without native bfloat16 has.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: demo test faults tables ablation fair zero-shot lint bench gpu clean about-demo about-test

demo: about-demo .venv/installed
	$(RUN) cache_embeddings.py --dataset shapes
	$(RUN) train.py --dataset shapes --recipe demo --tag demo
	$(RUN) eval.py --dataset shapes --method asymvlm-psd@demo --no-plots
	$(RUN) train.py --dataset shapes --recipe demo --tag demo --method asymvlm-vmf $(BASELINES)
	$(RUN) eval.py --dataset shapes --method all@demo

about-demo:
	@echo "draws images, embeds them, trains AsymVLM and the baselines (seed 0, a short recipe) and compares them: after the" \
	"installation, the first table in 2 minutes at most and the last in 5, on two cores"

tables: .venv/installed
	$(RUN) train.py --dataset $(DATASET) --method all --seed $(SEEDS) --recipe $(RECIPE) $(RESUME)
	$(RUN) eval.py --dataset $(DATASET) --method all --seed $(SEEDS)

ablation: .venv/installed
	$(RUN) train.py --dataset $(DATASET) --method all variants --seed $(SEEDS) --recipe $(RECIPE) $(RESUME)
	$(RUN) eval.py --dataset $(DATASET) --method variants --seed $(SEEDS) --no-plots --resamples 0
	$(RUN) eval.py --dataset $(DATASET) --method all --seed $(SEEDS)
	$(RUN) -m utils.questions.compare --dataset $(DATASET) --method all variants --seed $(SEEDS)

fair: .venv/installed
	$(RUN) train.py --dataset $(DATASET) --method all --seed $(SEEDS) --recipe $(RECIPE) $(RESUME)
	$(RUN) train.py --dataset $(DATASET) --method $(ORIGINALS) --seed $(SEEDS) --recipe original $(RESUME) \
	    $(addprefix --epochs ,$(ORIGINAL_EPOCHS))
	$(RUN) eval.py --dataset $(DATASET) --method all originals --seed $(SEEDS) --score own --no-plots --resamples 0
	$(RUN) eval.py --dataset $(DATASET) --method all originals --seed $(SEEDS) --score frozen --no-plots --resamples 0
	$(RUN) eval.py --dataset $(DATASET) --method originals --seed $(SEEDS) --no-plots --resamples 0
	$(RUN) eval.py --dataset $(DATASET) --method all --seed $(SEEDS)
	$(RUN) -m utils.questions.compare --dataset $(DATASET) --seed $(SEEDS) --name fair --against asymvlm-psd \
	    --method asymvlm-psd asymvlm-vmf $(BASELINES) $(ORIGINALS) \
	    --score published frozen own

zero-shot: .venv/installed
	$(RUN) cache_embeddings.py --dataset shapes
	$(RUN) cache_embeddings.py --dataset shapes-classes
	$(RUN) train.py --dataset shapes --method all --seed $(SEEDS) --recipe small --resume
	$(RUN) eval.py --dataset shapes-classes --trained-on shapes --method all --seed $(SEEDS) --zero-shot

test: about-test .venv/installed-tests
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

about-test:
	@echo "runs all tests: some 5 minutes on two cores, after the installation"

faults: .venv/installed-tests
	$(RUN) -m tests.faults

lint: .venv/installed-tests
	$(BIN)/ruff check --config tests/ruff.toml .
	$(BIN)/ruff format --config tests/ruff.toml --check .

.venv/installed: requirements.txt tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(CONSTRAINTS) -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/pip install -q $(CONSTRAINTS) -r tests/requirements.txt
	touch $@

bench: .venv/installed-tests
	mkdir -p results/benchmarks
	$(RUN) -m tests.benchmarks.calculated > results/benchmarks/calculated.md
	$(RUN) -m tests.benchmarks.train_step > results/benchmarks/train_step.md
	$(AVX2) $(RUN) -m tests.benchmarks.train_step --precision fp32 > results/benchmarks/train_step_avx2.md
	$(RUN) -m tests.benchmarks.seeds > results/benchmarks/seeds.md
	$(RUN) -m tests.benchmarks.evaluation > results/benchmarks/evaluation.md
	$(RUN) -m tests.benchmarks.caching > results/benchmarks/caching.md
	$(RUN) -m tests.benchmarks.scaling > results/benchmarks/scaling.md
	$(RUN) -m tests.benchmarks.limits > results/benchmarks/limits.md
	cat results/benchmarks/limits.md

gpu: .venv/installed-tests
	mkdir -p results/benchmarks
	$(RUN) -m tests.benchmarks.gpu > results/benchmarks/gpu.md; \
	    status=$$?; cat results/benchmarks/gpu.md; exit $$status

clean:
	rm -rf .venv data/shapes embeddings/shapes checkpoints/shapes results/shapes
