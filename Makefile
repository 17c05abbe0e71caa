# The developer's door: every target sets up what it needs and does nothing twice.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DELETE_ON_ERROR:

PY := .venv/bin/python
PYTEST := $(PY) -m pytest
# What a step is made from; the stamps are what tells that it was done.
NATIVE_SOURCES := $(shell find native rootfs -name '*.[chS]' -o -name '*.def' -o -name Makefile) \
  microvm/_build_native.py
ENV_STAMP := build/stamps/env
DEV_STAMP := build/stamps/dev
NATIVE_STAMP := build/stamps/native
GUEST_STAMP := build/stamps/guest
LINT_STAMP := build/stamps/lint

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

shell: $(GUEST_STAMP) ## a Linux guest, here, now (sets everything up the first time)
	@$(PY) -m microvm shell || { status=$$?; [ $$status -ne 125 ] || exit 125; }

build: $(GUEST_STAMP) ## the set-up alone: system packages, .venv, native code, guest kernel
	@:

test: $(GUEST_STAMP) $(DEV_STAMP) ## all tests
	@$(PYTEST) $(ARGS)

lint: $(NATIVE_STAMP) $(DEV_STAMP) $(LINT_STAMP) ## ruff, mypy --strict, clang-format; gcc's warnings are errors
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@find native rootfs -name '*.[ch]' -print0 | xargs -0 -r clang-format --dry-run -Werror

asan: $(GUEST_STAMP) $(DEV_STAMP) ## the tests of the native code under ASan and UBSan
	@scripts/step "native core with sanitizers" 0 $(PY) -m microvm._build_native --sanitize
	@MICROVM_NATIVE=$(CURDIR)/build/native-asan LD_PRELOAD="$$(cc -print-file-name=libasan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:handle_segv=0:use_sigaltstack=0 \
	  $(PYTEST) tests/unit tests/hostile $(ARGS)

bench: $(GUEST_STAMP) ## the benchmarks, beside their peers (tests/bench)
	@for bench in tests/bench/*.py; do $(PY) "$$bench" $(ARGS) || exit; done

fuzz: $(GUEST_STAMP) $(DEV_STAMP) ## generated tests, for longer: make fuzz SECONDS_EACH=600
	@MICROVM_FUZZ_SECONDS=$(or $(SECONDS_EACH),60) \
	  $(PYTEST) tests/fuzz tests/unit/test_silicon.py $(ARGS)

clean: ## removes what was built, not .venv and not the caches in ~/.cache/microvm
	@rm -rf build microvm/bin microvm/_native_ext*.so
	@find microvm tests -name __pycache__ -prune -exec rm -rf {} +

$(ENV_STAMP): scripts/bootstrap scripts/step pyproject.toml
	@scripts/bootstrap env </dev/null
	@mkdir -p $(@D) && touch $@

$(DEV_STAMP): $(ENV_STAMP)
	@scripts/bootstrap dev </dev/null
	@mkdir -p $(@D) && touch $@

$(NATIVE_STAMP): $(ENV_STAMP) $(NATIVE_SOURCES)
	@scripts/step "native core" $(words $(filter %.c %.S,$(NATIVE_SOURCES))) \
	  $(PY) -m microvm._build_native </dev/null
	@mkdir -p $(@D) && touch $@

$(GUEST_STAMP): $(NATIVE_STAMP)
	@scripts/bootstrap guest </dev/null
	@mkdir -p $(@D) && touch $@

$(LINT_STAMP): scripts/bootstrap
	@scripts/bootstrap lint </dev/null
	@mkdir -p $(@D) && touch $@

.PHONY: help shell build test lint asan bench fuzz clean
