# What can be done here; the work is in scripts/. `make` alone prints the list.
PREFIX ?= /usr
DESTDIR ?=
export PREFIX DESTDIR

.DEFAULT_GOAL := help
.PHONY: help run test check bench install deb setup fmt clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

run: ## build band and see it shut an attacker out, in a network of its own (changes nothing on this machine)
	@scripts/run.sh

test: ## all tests, on the real kernel in network namespaces
	@scripts/test.sh

check: ## formatting, clippy and the house rules
	@scripts/check.sh

bench: ## benchmarks
	@scripts/setup.sh build
	cargo bench

install: ## build and install under PREFIX (/usr); DESTDIR=... stages it and creates no user
	@scripts/install.sh

deb: ## build dist/band_VERSION_ARCH.deb
	@scripts/deb.sh

setup: ## install with apt what building, running and testing need and what is missing
	@scripts/setup.sh check
	@scripts/setup.sh test

fmt: ## format the code
	cargo fmt

clean: ## remove everything that was built
	cargo clean
	rm -rf dist
