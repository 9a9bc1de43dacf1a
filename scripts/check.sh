#!/usr/bin/env bash
# Formatting, lints and the house rules (tests/it/tidy.rs); each is tried, whatever the others say.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"

scripts/setup.sh check
failed=()
cargo fmt --check || failed+=("format (make fmt puts it right)")
cargo clippy --all-targets -- -D warnings || failed+=("clippy")
cargo test --quiet --test it tidy || failed+=("house rules")
if [ ${#failed[@]} -gt 0 ]; then
    printf 'check: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
