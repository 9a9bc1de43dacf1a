#!/usr/bin/env bash
# Formatting, lints and the house rules (tests/it/tidy.rs). Ends with an error at the first that is broken.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"

scripts/setup.sh check
cargo fmt --check
cargo clippy --all-targets -- -D warnings
cargo test --quiet --test it tidy
