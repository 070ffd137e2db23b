# netprobe's everyday commands. `make demo` and `make test` work from a fresh clone on a fresh Debian machine, as root, with a Rust
# toolchain installed: whatever else is missing they install first (deps), saying so.

# Debian packages: to build, to check, to run the live tests here and in virtual machines.
PACKAGES = clang llvm gcc make pkg-config libelf-dev zlib1g-dev libpcap-dev bpftool clang-format \
	iproute2 iptables nftables iputils-ping tcpdump tshark \
	xdp-tools lintian mmdebstrap rpm umoci chromium \
	qemu-system-x86 busybox-static kmod cpio xz-utils zstd lz4 python3
C_FILES = $(wildcard src/bpf/*/*.[ch] examples/*.[ch] tests/data/*.[ch])
STATIC_TARGET = $(shell uname -m)-unknown-linux-gnu

.DEFAULT_GOAL := build
.PHONY: build release static install deb rpm packages oci dist deps cross-deps cross-arm64 test-arm64 test check fmt unit live live-everywhere fuzz fuzz-filter demo bench clean reference \
	documents

build: deps ## debug build
	cargo build --locked

# The whole program in one piece for the optimizer: a fifth smaller, and some minutes more than plain `cargo build --release`.
COMMIT = $(shell git describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null)
WHOLE = CARGO_PROFILE_RELEASE_LTO=fat CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1
release: deps ## release build: target/release/netprobe (glibc stays dynamic)
	NETPROBE_COMMIT=$(COMMIT) $(WHOLE) cargo build --locked --release

static: deps ## one file that runs anywhere: target/ARCH-unknown-linux-gnu/release/netprobe
	NETPROBE_COMMIT=$(COMMIT) RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --release --target $(STATIC_TARGET)
	@file -L target/$(STATIC_TARGET)/release/netprobe 2>/dev/null || true

cross-deps:
	@$(MAKE) --no-print-directory deps PACKAGES="$(PACKAGES) gcc-aarch64-linux-gnu qemu-system-arm"

cross-arm64: cross-deps ## one file for arm64 machines: target/arm64/aarch64-unknown-linux-gnu/release/netprobe
	NETPROBE_COMMIT=$(COMMIT) CROSS_RUSTFLAGS="-C target-feature=+crt-static" packaging/cross arm64 build --locked --release

# Debian has no 5.10 for arm64 any more.
test-arm64: cross-deps ## the live tests on arm64 kernels, in emulation: some 50 minutes
	tests/vm/live --arch arm64 6.1 6.12 newest

PREFIX ?= /usr/local
install: release ## puts netprobe, its manual pages and completions below $(DESTDIR)$(PREFIX)
	packaging/stage target/release/netprobe "$(DESTDIR)" "$(PREFIX)"

deb: static ## target/packages/netprobe_VERSION_ARCH.deb: the static binary, manual pages, completions, a systemd unit
	packaging/deb target/$(STATIC_TARGET)/release/netprobe target/packages

rpm: static ## target/packages/netprobe-VERSION-1.ARCH.rpm
	packaging/rpm target/$(STATIC_TARGET)/release/netprobe target/packages

oci: static ## target/packages/netprobe-oci: an OCI image of the static binary alone
	packaging/oci target/$(STATIC_TARGET)/release/netprobe target/packages

# SOURCE_DATE_EPOCH is the last commit's time, so that two machines give the same packages of the same programs.
dist: cross-deps static cross-arm64 ## all that a release has, for both architectures, with SBOM and checksums: target/dist
	packaging/dist target/dist target/$(STATIC_TARGET)/release/netprobe \
		target/arm64/aarch64-unknown-linux-gnu/release/netprobe

# Installs what is missing, and nothing the next time.
deps: ## the Debian packages that everything here needs
	@missing=; \
	for package in $(PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "deps: no apt-get here; install what these Debian packages have:$$missing" >&2; exit 1; }; \
	[ "$$(id -u)" = 0 ] || { echo "deps: not root; run: sudo apt-get install --no-install-recommends$$missing" >&2; exit 1; }; \
	echo "deps: installing$$missing"; \
	log=$$(mktemp); \
	export DEBIAN_FRONTEND=noninteractive; \
	if ! { apt-get -q -o Acquire::Retries=3 update && apt-get -q -y -o Acquire::Retries=3 install --no-install-recommends $$missing; } \
		>"$$log" 2>&1 </dev/null; then \
		tail -n 40 "$$log" >&2; rm -f "$$log"; echo "deps: installing failed" >&2; exit 1; \
	fi; \
	rm -f "$$log"

test: deps check unit live packages ## everything: checks, unit tests, live tests here and on four kernels

check: ## formatting and lints, warnings denied
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	clang-format --dry-run --Werror $(C_FILES)

fmt: ## formats Rust and C
	cargo fmt
	clang-format -i $(C_FILES)

unit: ## unit, command line and live tests on this machine; what it cannot do is ignored with the reason
	cargo test --locked
	@echo 'a second build must rebuild nothing'
	@cargo build --locked -q && ! cargo build --locked 2>&1 | grep Compiling

live: ## the live tests in a virtual machine for each kernel: each where it can tell something different
	tests/vm/live all

live-everywhere: deps ## each live test on each kernel: some 80 minutes
	NETPROBE_LIVE_EVERYWHERE=1 tests/vm/live all

fuzz: ## changed recordings through report for SECONDS (default: an hour)
	NETPROBE_FUZZ_SECONDS=$(or $(SECONDS),3600) cargo test --locked --release --test recording changed_files -- --nocapture

# What tests/vm/live has built, so that there is nothing to build after it; stripped, as a release is.
packages: export CARGO_PROFILE_RELEASE_DEBUG = line-tables-only
packages: export CARGO_PROFILE_RELEASE_STRIP = none
packages: ## the Debian package: built twice, installed in a new Debian root, used, purged; the image; rules for Prometheus
	cargo test --locked --release --test live --no-run
	strip -o target/netprobe-stripped target/release/netprobe
	packaging/test target/netprobe-stripped
	packaging/oci-test target/netprobe-stripped
	packaging/dist-test target/netprobe-stripped
	deploy/prometheus/test
	deploy/clickhouse/test

soak: export NETPROBE_LIVE_EVERYWHERE = 1
soak: deps ## the long forms of what the live tests do briefly: a million drops, a minute of random loss (SOAK=60: an hour), 1,000 connections, 100 kills, a burst of 20,000
	NETPROBE_SOAK=1 tests/vm/live all drops_burst
	NETPROBE_SOAK=$(or $(SOAK),1) NETPROBE_LIVE_TIMEOUT=$$((3000 + 90 * $(or $(SOAK),1))) tests/vm/live all drops_memory
	NETPROBE_SOAK=1 tests/vm/live all drops_nothing
	NETPROBE_SOAK=1 tests/vm/live 6.12 record_killed
	NETPROBE_SOAK=1 tests/vm/live 6.12 why_burst

# Round after round with a new seed, each with so many comparisons in each of its two parts; a difference ends it and shows
# the program and the packet. FUZZ_FILTER_ROUNDS=N: so many rounds.
FUZZ_FILTER_PAIRS ?= 1000000
fuzz-filter: deps ## random filters, translated, against libpcap's interpreter and the kernel's own, until Ctrl-C
	@round=0; while [ "$$round" != "$(FUZZ_FILTER_ROUNDS)" ]; do \
		round=$$((round + 1)); \
		FUZZ_FILTER_SEED=$$(od -An -N7 -tu8 /dev/urandom | tr -d ' ') FUZZ_FILTER_PAIRS=$(FUZZ_FILTER_PAIRS) \
			cargo test --locked --release --lib -- --nocapture filter::tests::differential || exit 1; \
	done

demo: deps ## the main job, shown: a connection before and after an iptables rule drops it
	demo/run

bench: deps ## what netprobe costs, beside the limit and peers, in instruction-counted machines: one table
	bench/run $(BENCH)

reference: ## docs/reference, from the help of each subcommand
	NETPROBE_WRITE_REFERENCE=1 cargo test --locked --test cli the_reference

documents: deps release ## output in README.md and docs/cookbook.md, and the picture: all from real runs
	docs/cookbook/fill
	demo/picture

clean: ## removes the build (the kernels for the virtual machines stay in ~/.cache/netprobe/vm)
	cargo clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10
.PHONY: help
