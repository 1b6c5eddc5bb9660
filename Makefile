# Needs GNU make, a POSIX sh and Python 3.11 to 3.13; everything else goes into .venv.

# The first Python that fits; `make PYTHON=… test` names one. Looked for only when .venv has to be set up.
PYTHON ?= $(or $(shell for p in python3 python3.11 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo "$$p" && break; done), \
	$(error SHINE needs Python 3.11, 3.12 or 3.13 and found none. Install one (Debian, Ubuntu: apt install python3.12-venv; \
	macOS: brew install python@3.12; conda create -n shine python=3.12) or name it: make PYTHON=/path/to/python3.12 …))
READY = .venv/.ready
ENGINES = .venv/.engines
RUN = .venv/bin/python
TIMED = start=$$(date +%s); set -- $$part; $(RUN) benchmarks/$$1.py $${2-} || exit 1; \
	echo "$$part took $$(($$(date +%s) - start)) s"; echo

.DEFAULT_GOAL = help
.PHONY: help setup demo test test-all lint bench bench-all reproduce lock clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Each sets up .venv first when it is missing or older than requirements.lock."
	@echo "TORCH_INDEX=<url>  takes torch from that index: https://download.pytorch.org/whl/cpu, …/whl/cu130, a mirror of them."
	@echo "                   Unset: the CPU build where there is no nvidia-smi, else what pip finds; it is said before it is done."
	@echo "PYTHON=<program>   sets .venv up with that Python (3.11 to 3.13)."

setup: $(READY) ## set up .venv, pinned by requirements.lock

$(READY): requirements.lock pyproject.toml scripts/setup_venv.py
	@"$(PYTHON)" scripts/setup_venv.py

demo: $(READY) ## train the CPU world briefly, score the shipped checkpoint, write outputs/demo (at most 10 minutes)
	@$(RUN) examples/demo.py

test: $(READY) ## run the test suite without what is slow, and list what was left out (under 10 minutes)
	@$(RUN) -m pytest -m "not slow" --numprocesses auto --maxprocesses 8
	@echo "Left out as slow (make test-all runs them):"
	@$(RUN) -m pytest -m slow --collect-only -q | grep :: || echo "none"

$(ENGINES): $(READY)
	@$(RUN) scripts/setup_venv.py engines

test-all: $(ENGINES) ## run every test; once builds llama.cpp and adds Gradio for it (a C++ compiler, minutes)
	@$(RUN) -m pytest

lint: $(READY) ## check style, format and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: $(READY) ## time what has a target on SmolLM2-135M: steps, encoding, answering (14 minutes on two cores)
	@for part in train_step "encode --without-recipe" "generate --brief"; do $(TIMED); done

bench-all: $(READY) ## the same with all ways to encode and to answer, and an evaluation (14 to 25 minutes)
	@for part in train_step encode generate evaluate; do $(TIMED); done

reproduce: $(READY) ## rebuild the CPU world from nothing (at most two hours on two cores)
	@PYTHON=$(RUN) sh examples/cpu_world/reproduce.sh

lock: ## write requirements.lock again with the newest releases pyproject.toml allows (Python 3.11)
	@"$(PYTHON)" scripts/setup_venv.py lock

clean: ## remove .venv, caches and build products; outputs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
