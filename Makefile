# `make serve` and `make test` are all a fresh clone needs; both install into .venv.
PYTHON ?= python3
BIN := .venv/bin

NATIVE := setup.py $(wildcard model/native/*.[ch])
C_FILES := $(filter %.c %.h,$(NATIVE)) tests/native/check.c

.PHONY: serve test test-slow lint format alerts proto sanitize benchmarks docs reference chaos soak reloads faults fuzz lock licences sbom clean

serve: .venv/serve
	$(BIN)/rednet serve

test: lint
	$(BIN)/pytest -n 2 -m "not slow"  # half of the time is waiting for servers to start

# What `make test` leaves out: servers that are killed, reloaded and stopped under load, whole training runs, compilers.
test-slow: .venv/test
	$(BIN)/pytest -m slow

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# The schema of gRPC, which the server reads in its compiled form.
proto: .venv/test
	$(BIN)/python -m grpc_tools.protoc -I service/grpc --descriptor_set_out=service/grpc/inference.binpb inference.proto

# The native code under the address, undefined-behaviour and thread sanitizers, in each build: four minutes.
sanitize: $(foreach sanitizer,address_undefined thread,$(foreach build,int8_vnni int8_avx2 avx512 avx2 generic,sanitize-$(sanitizer)-$(build)))
avx512 := -DVL=16 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma
avx2 := -DVL=8 -mavx2 -mfma
generic := -DVL=4
int8_vnni := $(avx512) -mavx512vnni -mavx512vbmi -DINT8
int8_avx2 := $(avx2) -DINT8
comma := ,
sanitize-%: tests/native/check.c $(NATIVE)
	mkdir -p build
	$(eval words := $(subst -, ,$*))
	$(CC) -std=gnu11 -O1 -g -Wall -Wextra -fsanitize=$(subst _,$(comma),$(word 1,$(words))) -fno-sanitize-recover=all \
	    $($(word 2,$(words))) -DBUILD=$(word 2,$(words)) -Imodel/native $< -o build/$@ -lm -pthread
	build/$@

# Tables on the screen; JSON and pictures in build/benchmarks. Most of the half hour is other compilers' compiling.
benchmarks: .venv/benchmarks
	$(foreach name,network int8 involution training busy startup,$(BIN)/python -m benchmarks.$(name) &&) true

# The parts of docs/reference that are made from the code, after a change to options, endpoints, errors, metrics, alerts or docstrings.
reference: .venv/test
	$(BIN)/python -m docs_tools

# The alerts for the Prometheus Operator, after a change to those for Compose: kustomize cannot put one file into another.
RULE = deploy/kubernetes/monitoring/prometheusrule.yaml
alerts:
	{ sed '/^spec:/q' $(RULE); sed 's/^./  &/' docker/prometheus/alerts.yml; } > $(RULE).new
	mv $(RULE).new $(RULE)

# The documentation as a site, in build/site. A warning is an error: a link to nowhere, a page that is not in the menu.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# 10,000 requests, good and bad, from callers of whom many leave: some minutes. And an hour of them: memory must not grow.
# Sixty reloads under load take some minutes, too.
# Faults: processes killed, checkpoints loaded again and servers stopped under load, 20 times each: half an hour.
chaos soak reloads faults: .venv/test
	$(BIN)/python -m tests.$@

# Half an hour of bytes that no photo has; what breaks something is left in build/fuzz.
fuzz: .venv/test
	$(BIN)/pip install --quiet atheris==3.0.0
	mkdir -p build/fuzz
	$(foreach run,decode:1200 infer:200 grpc:200 uploads:100 embeddings:100,(cd build/fuzz && PYTHONPATH=../.. ../../$(BIN)/python -m tests.fuzz \
	    $(word 1,$(subst :, ,$(run))) -max_total_time=$(word 2,$(subst :, ,$(run)))) &&) true

# The pins of *.in and of what they need, with hashes; those of the extras that an image can have, in the versions that are
# tested; the licences of what the server needs; its SBOM in CycloneDX's format (make sbom EXTRAS="grpc heif").
LOCK = build/tools/bin/uv pip compile --quiet --no-annotate --universal --python-version 3.11.5 --constraint requirements.in \
    --generate-hashes --custom-compile-command "make lock"
EXTRA = import sys, tomllib; print(*tomllib.load(sys.stdin.buffer)["project"]["optional-dependencies"]["$1"], sep="\n")
lock: build/tools
	$(foreach each,requirements requirements-dev docs/requirements,$(LOCK) --output-file $(each).txt $(each).in &&) true
	$(foreach each,grpc heif otel,build/tools/bin/python -c '$(call EXTRA,$(each))' < pyproject.toml \
	    | $(LOCK) --constraint requirements-dev.txt --output-file requirements-$(each).txt - &&) true

licences: build/tools .venv/serve
	(sed '/^|/,$$d' docs/reference/licences.md; build/tools/bin/pip-licenses --with-system --python $(BIN)/python --format markdown \
	    --packages torch $$(sed -n 's/==.*//p' requirements.in)) > build/licences.md
	mv build/licences.md docs/reference/licences.md

sbom: build/tools
	cat requirements.txt requirements-torch.txt $(EXTRAS:%=requirements-%.txt) \
	    | sed ':line; /\\$$/{N; s/\\\n//; b line}' | sort -u | build/tools/bin/cyclonedx-py requirements --pyproject pyproject.toml \
	    --output-file build/sbom.cdx.json -

build/tools:
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet cyclonedx-bom==7.5.0 pip-licenses==5.5.5 uv==0.13.9

clean:
	rm -rf .venv build *.egg-info model/native/*.so

# Each of these two files marks a finished installation.
.venv/serve: requirements.txt requirements-torch.txt pyproject.toml $(NATIVE)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements.txt
	@$(if $(TORCH_INDEX),true,$(warn_of_cuda))
	$(BIN)/pip install $(addprefix --extra-index-url ,$(TORCH_INDEX)) -r requirements-torch.txt
	rm -f model/native/*.so  # built for another Python, or by an older version
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# `make serve TORCH_INDEX=<index of the CPU builds>` installs the CPU build. Elsewhere than on x86-64 it is the default.
warn_of_cuda := [ "$$(uname -m)" != x86_64 ] || [ -e /proc/driver/nvidia ] || echo "No NVIDIA driver found. PyTorch's default build for \
x86-64 downloads several GB of CUDA libraries, the CPU build 0.2 GB: see docs/start/install.md to choose"

.venv/test: .venv/serve requirements-dev.txt docs/requirements.txt
	$(BIN)/pip install --quiet --require-hashes -r requirements-dev.txt -r docs/requirements.txt
	touch $@

.venv/benchmarks: .venv/serve benchmarks/requirements.txt
	$(BIN)/pip install --quiet -r benchmarks/requirements.txt
	touch $@

.venv/docs: .venv/serve docs/requirements.txt
	$(BIN)/pip install --quiet --require-hashes -r docs/requirements.txt
	touch $@
