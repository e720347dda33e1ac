# A short name for each thing a developer does; the work is in scripts/ (a fresh machine has no make).

.DEFAULT_GOAL := help
.PHONY: help demo demo-api test test-fast test-slow bench soak lint fmt build dist

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Prepare this host and run a first job in a microVM
	scripts/demo.sh

demo-api: ## API mode in small: NATS, two replicas, two runners, some of them killed
	scripts/demo-api.sh

test: ## Run every check and test, as CI does
	scripts/test.sh

test-fast: ## Checks and unit tests only: no image, no VM
	scripts/test.sh --fast

test-slow: ## Everything, and the full image: Chromium, the real agent CLI
	scripts/test.sh --slow

bench: ## Measure this host beside runc and gVisor (docs/performance.md)
	scripts/bench.sh

soak: ## Repeat the end-to-end tests until something breaks (ROUNDS=10)
	scripts/test.sh --soak $${ROUNDS:-10}

lint: ## Formatting, clippy, cargo deny, shellcheck
	scripts/test.sh --lint

fmt: ## Format the Rust code
	cargo fmt --all

build: ## Build the release binary with its guest programs: target/release/runner
	scripts/build.sh

dist: ## Make the release's tarball and Debian package, with checksums: target/dist
	scripts/dist.sh
