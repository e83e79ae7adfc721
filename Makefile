# Every command a person needs. Each target sets up a virtual environment by itself; `make VENV= PYTHON=python3 demo`
# uses the interpreter at hand instead. ARGS go to the script: `make train ARGS=--resume`.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

ifeq ($(strip $(VENV)),)
PY    := $(PYTHON)
READY :=
DEV   :=
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
DEV   := $(VENV)/.ready-dev
endif

V10 := v10_transformer_lowrank_scaled.py
V7  := v7_transformer_dense_baseline.py
V11 := v11_transformer_lowrank_spectron.py

# The demo: three small runs that differ in one thing each.
DEMO := --data-file data/synthetic.tokens --d-model 128 --n-layers 3 --n-heads 4 --d-ff 512 --block-size 64 \
        --epochs 10 --steps-per-epoch 45 --lr 2e-3 --dtype float32
DEMO_RANKS := --init-rank 32 --min-rank 4
DEMO_DIR ?= logs/demo
DEMO_LOGS := v10.jsonl v10_bidirectional.jsonl v7.jsonl

.PHONY: help setup data demo train reproduce baseline v11 plots study compress scaling results bench test soak fuzz lint clean

help:           ## print this
	@grep -E '^[a-z0-9]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):[^#]*## */  make \1\t/' | expand -t 18

setup: $(READY) ## create the virtual environment and install what training needs

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

data: $(READY)  ## fetch and verify WikiText-2 (12 MB)
	$(PY) data/wikitext2.py

demo: $(READY)  ## three small runs, tables and figures, in minutes and offline
	$(PY) $(V10) $(DEMO) $(DEMO_RANKS) --log-file $(DEMO_DIR)/v10.jsonl --overwrite
	$(PY) $(V10) $(DEMO) $(DEMO_RANKS) --attention bidirectional --log-file $(DEMO_DIR)/v10_bidirectional.jsonl --overwrite
	$(PY) $(V7) $(DEMO) --log-file $(DEMO_DIR)/v7.jsonl --overwrite
	$(PY) plot_logs.py $(addprefix $(DEMO_DIR)/,$(DEMO_LOGS))
	@echo
	@echo "The same with figures, to look at in a browser: $(DEMO_DIR)/figures/index.html"

# Where WikiText-2 cannot be fetched, training takes the synthetic corpus, and says so.
FETCH = test -f data/wiki.train.tokens || test -f wiki.train.tokens || $(PY) data/wikitext2.py || true

train: $(READY) ## the report's experiment, with a causal mask
	@$(FETCH)
	$(PY) $(V10) --log-file logs/v10.jsonl $(ARGS)

reproduce: $(READY) ## the same without the mask, as in the report: the model sees its targets
	@$(FETCH)
	$(PY) $(V10) --attention bidirectional --log-file logs/v10_bidirectional.jsonl $(ARGS)

baseline: $(READY) ## the same with dense layers and the mask
	@$(FETCH)
	$(PY) $(V7) --log-file logs/v7.jsonl $(ARGS)

v11: $(READY)   ## the successor: low rank with controlled steps, cut to a tenth of the linear parameters
	@$(FETCH)
	$(PY) $(V11) --log-file logs/v11.jsonl $(ARGS)

plots: $(READY) ## tables and figures from the logs in logs/ (or LOGS=...)
	$(PY) plot_logs.py $(or $(LOGS),logs/*.jsonl) $(ARGS)

study: $(READY) ## the 590 runs behind the results, on WikiText-2, two side by side; many hours, resumable
	@test -f data/wiki.train.tokens || $(PY) data/wikitext2.py
	$(PY) study.py $(ARGS)

compress: $(READY) ## of these, the trained models that compress.py cuts, three seeds of each; an hour or two
	@test -f data/wiki.train.tokens || $(PY) data/wikitext2.py
	$(PY) study.py --only compressed_dense compressed_muon compressed_v11 \
		compressed_narrow136 compressed_narrow80 compressed_narrow192 $(ARGS)

scaling: $(READY) ## 114 runs behind the scaling law, on a synthetic text, two side by side; hours, resumable
	$(PY) scaling.py $(ARGS)

results: $(READY) ## every table and figure of README.md and RESULTS.md, from logs/reference: a minute
	$(PY) plot_logs.py $(addprefix logs/reference/demo/,$(DEMO_LOGS))
	$(PY) plot_logs.py logs/reference/wikitext2_start/*.jsonl
	$(PY) bench.py --show logs/reference/bench.json
	$(PY) tests/soak.py --show logs/reference/soak.jsonl
	$(PY) results.py

bench: $(READY) ## speed and memory as ratios, at the report's size: half an hour
	$(PY) bench.py $(ARGS)

test: $(DEV)    ## the tests: about 6 minutes on two CPU cores
	$(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

soak: $(DEV)    ## kill small runs 33 times, resume them, compare; stop 20 under torchrun: 10 minutes
	$(PY) -m pytest -q -m soak
	$(PY) tests/soak.py $(ARGS)

fuzz: $(DEV)    ## mutated inputs for all that reads a file, 2,000 cases a target: minutes
	$(PY) tests/fuzz.py $(ARGS)

lint: $(DEV)    ## ruff
	$(PY) -m ruff check .

clean:          ## remove the environment and caches; never logs or data
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
