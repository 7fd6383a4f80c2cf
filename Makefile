# Every target does all of its own set-up, on a machine with Python 3.11 or later and gcc.
PYTHON  ?= python3
VENV    ?= .venv
BIN      = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# demo
MINUTES ?= 6
OUT     ?= out
SEED    ?= 0

SOURCES  = setup.py pyproject.toml $(shell find csrc -type f)
C_FILES  = $(wildcard csrc/*/*.[ch])
INCLUDES = $(wildcard csrc/*/*.inc)

help:
	@echo "make demo   the tour: pretrain, align, prune, quantize, generate (MINUTES=6 OUT=out SEED=0)"
	@echo "make test   every test"
	@echo "make bench  every benchmark on this machine, and the table of all kinds of machines (BENCH='linear gelu' for some)"
	@echo "make lint   formats, ruff, mypy on the stubs, a build in which a warning is an error"
	@echo "make asan   the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make old    the kernel tests of the baseline on an emulated processor without AVX (qemu-user)"
	@echo "make arm    the same on an emulated aarch64 (cross compiler, qemu-user)"
	@echo "make avx512 the kernel tests of AVX-512, its instructions made of those of AVX2 (SIMDe)"
	@echo "make fuzz   random shapes, strides and types at every op (EXAMPLES=2000 each, ATTENTION=n: its features)"
	@echo "make wheel  the wheel, in dist/"

demo: $(VENV)/installed-demo
	$(BIN)/python -m numformer.demo --minutes $(MINUTES) --out $(OUT) --seed $(SEED)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks $(BENCH)

lint: export NUMFORMER_WERROR = 1
lint: $(VENV)/installed-dev
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	@for f in $(INCLUDES); do $(BIN)/clang-format --assume-filename=x.c < $$f | cmp -s - $$f \
	    || { echo "$$f: not as clang-format writes it"; exit 1; }; done
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python setup.py -q build_ext --build-temp build/objects --build-lib build/werror

# Python's own allocations leak at exit by design, so leaks are not looked for. Tests ask for more memory than there is.
asan: $(VENV)/installed-dev
	NUMFORMER_SANITIZE=1 $(BIN)/python setup.py -q build_py --build-lib build/asan build_ext --build-temp build/asan \
	    --build-lib build/asan
	PYTHONPATH=build/asan:. LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 NUMFORMER_EXAMPLES=5 NUMFORMER_ATTENTION=100 \
	    $(BIN)/python -m pytest -p no:cacheprovider --ignore tests/kernels/test_attention_error.py \
	    tests/kernels tests/test_properties.py tests/test_bad_input.py

# Emulated processors prove instructions and portable code, not formulas or memory: tests marked native are left out,
# and of each other every fourth case is taken for old instructions, every second for portable code.
# What the environment tells OpenBLAS of the processor that is there is not true of one that is emulated.
EMULATED = -p no:cacheprovider -m 'not native'

old: export NUMFORMER_EVERY ?= 4
old: $(VENV)/installed-dev
	OPENBLAS_CORETYPE=Nehalem NUMFORMER_ATTENTION=25 qemu-x86_64 -cpu Nehalem-v1 $(BIN)/python -m pytest $(EMULATED) $(or $(OLD_TESTS),tests/kernels)

avx512: $(VENV)/installed-dev
	NUMFORMER_EMULATE=1 $(BIN)/python setup.py -q build_py --build-lib build/avx512 build_ext --build-temp build/avx512 \
	    --build-lib build/avx512
	PYTHONPATH=build/avx512:. NUMFORMER_ATTENTION=100 $(BIN)/python -m pytest $(EMULATED) -k avx512 $(or $(AVX512_TESTS),tests/kernels)

arm: export NUMFORMER_EVERY ?= 2
arm: $(VENV)/installed-dev
	.ci/aarch64

fuzz: $(VENV)/installed-dev
	NUMFORMER_EXAMPLES=$(or $(EXAMPLES),2000) $(BIN)/python -m pytest tests/test_properties.py
	$(if $(ATTENTION),NUMFORMER_ATTENTION=$(ATTENTION) $(BIN)/python -m pytest tests/kernels/test_attention_features.py -k random)

wheel: $(VENV)/installed-dev
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w dist .

# The extension is built beside python/numformer and found there; only changed files are compiled.
$(VENV)/installed-%: $(VENV)/made $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[$*]'
	touch $@

$(VENV)/made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q 'setuptools>=77' 'numpy>=2.0'
	touch $@

clean:
	rm -rf build dist $(VENV) python/*.egg-info python/numformer/*.so

.PHONY: help demo test bench lint asan old avx512 arm fuzz wheel clean
