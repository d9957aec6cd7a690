# The one door. `make help` lists the targets.
#
# Every target installs what it needs, once: Debian packages by apt-get (as root), crates by cargo.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Where the suites of public policy cases lie, if they do.
CASES ?= ../shared/conformance
export BULKHEAD_CASES ?= $(abspath $(CASES))
export BULKHEAD_BIN ?= $(abspath $(TARGET)/release/bulkhead)

# Random clusters that the oracle judges, each in four states, and the first one's seed.
ORACLE_ROUNDS ?= 600
ORACLE_SEED ?= 1

# Requests that Schemathesis makes for each operation of the API and each of its phases.
API_EXAMPLES ?= 100

# Agents that come back to a controller at once.
CHAOS_AGENTS ?= 5000

# Seconds that each fuzz target runs.
FUZZ_SECONDS ?= 60
# Seconds for which random histories go through both dataplanes, side by side, and the first one's number: others each time.
DIFFERENTIAL_SECONDS ?= 300
DIFFERENTIAL_SEED ?= $(shell date +%s)000
FUZZ_TARGETS := selector document port_match kubernetes wire
FUZZ_HOST = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_FLAGS := --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0

BUILD_PACKAGES := clang llvm gcc make pkg-config libelf-dev zlib1g-dev linux-libc-dev protobuf-compiler libprotobuf-dev
# libFuzzer itself is C++.
FUZZ_PACKAGES := g++
TEST_PACKAGES := python3 iproute2 iptables nftables ipset iputils-ping docker.io busybox-static etcd-server etcd-client openssl systemd
# Whatever kubectl there is will do: Debian's is the oldest that is tried.
TEST_PACKAGES += $(if $(shell command -v kubectl),,kubernetes-client)

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: build-deps ## Build the release binary, target/release/bulkhead
	$(CARGO) build --release --locked -p bulkhead

.PHONY: demo
demo: root build test-deps ## Show the whole thing on three hosts made of namespaces (KEEP=1 leaves it running)
	$(CARGO) build --release --locked -p bulkhead-testbed --bin bulkhead-demo
	$(TARGET)/release/bulkhead-demo --bulkhead $(BULKHEAD_BIN) $(if $(KEEP),--keep)

.PHONY: demo-clean
demo-clean: root ## Remove what a demo with KEEP=1 left
	$(TARGET)/release/bulkhead-demo --clean

.PHONY: test
test: root build test-deps conformance oracle-short api-fuzz-short ## Run every test, those on real kernels, hosts and containers too
	$(CARGO) test --locked --workspace
	BULKHEAD_DATAPLANE=nftables $(CARGO) test --locked -p bulkhead-tests

.PHONY: conformance
conformance: build ## Run the public policy cases, where they lie beside the checkout
	@if [ -d $(CASES) ]; then \
	  for by in "" --reference; do python3 $(CASES)/run.py --bulkhead "$(BULKHEAD_BIN)" $$by $(CASES)/*.jsonl.gz; done; \
	else \
	  echo "no public cases in $(CASES): nothing to run"; \
	fi

.PHONY: kernel-conformance
kernel-conformance: root build-deps test-deps ## Try every public policy case with real sockets over both dataplanes; `make test` tries some
	BULKHEAD_CONFORMANCE=all $(CARGO) test --locked -p bulkhead-dataplane-testing --test conformance -- --nocapture

.PHONY: oracle
oracle: build ## Compare verdicts with an independent reading of Kubernetes' and Calico's policies (ORACLE_ROUNDS=600, ORACLE_SEED=1)
	@$(call install,python3)
	@python3 tests/oracle/fuzz.py --bulkhead "$(BULKHEAD_BIN)" --rounds $(ORACLE_ROUNDS) --seed $(ORACLE_SEED)

.PHONY: oracle-short
oracle-short:
	@$(MAKE) --no-print-directory oracle ORACLE_ROUNDS=100 ORACLE_SEED=1

.PHONY: api-fuzz
api-fuzz: build ## Requests made from the API's description, right and wrong ones, as several callers (API_EXAMPLES=100 for each operation)
	@$(call install,python3 python3-venv)
	@tests/api/fuzz.sh "$(BULKHEAD_BIN)" $(API_EXAMPLES)

.PHONY: api-fuzz-short
api-fuzz-short:
	@$(MAKE) --no-print-directory api-fuzz API_EXAMPLES=8

.PHONY: model
model: build-deps ## Try every way that the protocol between controller and agents can go, further than `make test` does
	BULKHEAD_MODEL=whole $(CARGO) test --release --locked -p bulkhead-controller --lib model -- --nocapture

.PHONY: chaos
chaos: root build-deps test-deps ## Kill, cut off and fill what controllers depend on, as `make test` does, with 5000 agents (CHAOS_AGENTS=5000)
	BULKHEAD_CHAOS_AGENTS=$(CHAOS_AGENTS) $(CARGO) test --locked -p bulkhead-controller --test chaos -- --nocapture

.PHONY: bench
bench: root build test-deps ## Measure side by side with the alternatives; writes target/bench.json
	$(CARGO) build --release --locked -p bulkhead-bench
	$(TARGET)/release/bulkhead-bench $(BENCH_FLAGS)

.PHONY: bench-fleet
bench-fleet: root build ## Measure 5000 simulated agents, 100 000 workloads, 10 000 policies, 20 000 activations a second
	$(CARGO) build --release --locked -p bulkhead-bench
	BULKHEAD_BIN="$(BULKHEAD_BIN)" $(TARGET)/release/bulkhead-bench --only fleet-full --output $(TARGET)/bench-fleet.json

.PHONY: bench-chart
bench-chart: build-deps ## Draw docs/images/scale.svg from target/bench.json
	$(CARGO) build --release --locked -p bulkhead-bench
	$(TARGET)/release/bulkhead-bench --chart docs/images/scale.svg

.PHONY: lint
lint: build-deps ## Format, lints and the house rules
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) xtask tidy

.PHONY: fuzz
fuzz: root fuzz-build ## Arbitrary bytes for every reader of foreign ones (FUZZ_SECONDS=60 for each), then `make differential`
	@CARGO_TARGET_DIR=$(abspath $(TARGET)) fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)
	@$(MAKE) --no-print-directory differential

.PHONY: differential
differential: root build-deps test-deps ## Random policies and packets: reference, tables and both dataplanes agree (DIFFERENTIAL_SECONDS=300)
	DIFFERENTIAL_SECONDS=$(DIFFERENTIAL_SECONDS) DIFFERENTIAL_SEED=$(DIFFERENTIAL_SEED) \
	  $(CARGO) test --locked -p bulkhead-dataplane-testing --test differential -- --nocapture random

# The instrumentation that cargo-fuzz asks for, without its sanitizers: those need a nightly compiler. --target keeps it
# out of build scripts and macros.
.PHONY: fuzz-build
fuzz-build: build-deps
	@$(call install,$(FUZZ_PACKAGES))
	RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build --locked --release --manifest-path fuzz/Cargo.toml \
	  --target $(FUZZ_HOST) --target-dir $(abspath $(TARGET))/fuzz

.PHONY: fuzz-short
fuzz-short:
	@$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=10 DIFFERENTIAL_SECONDS=30 DIFFERENTIAL_SEED=1

.PHONY: ci
ci: lint test fuzz-short ## What CI runs

.PHONY: man
man: build ## Write the manual pages to target/man and completions to target/completions
	$(TARGET)/release/bulkhead man $(TARGET)/man
	mkdir -p $(TARGET)/completions
	for shell in bash zsh fish; do $(TARGET)/release/bulkhead completion $$shell > $(TARGET)/completions/bulkhead.$$shell; done

.PHONY: root
root:
	@if [ "$$(id -u)" != 0 ]; then \
	  echo "this needs root: it makes network namespaces and loads programs into the kernel. Try: sudo make $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	fi

.PHONY: build-deps test-deps
build-deps:
	@$(call install,$(BUILD_PACKAGES))
test-deps:
	@$(call install,$(TEST_PACKAGES))
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf

# Installs the Debian packages among $(1) that are not there yet; quiet and quick if all are.
define install
missing=$$(for package in $(1); do dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'install ok installed' || echo $$package; done); \
if [ -n "$$missing" ]; then \
  if [ "$$(id -u)" != 0 ]; then echo "these Debian packages are missing, and installing them needs root:" $$missing >&2; exit 1; fi; \
  echo "installing" $$missing; \
  apt-get update -qq; \
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing > /dev/null; \
fi
endef
