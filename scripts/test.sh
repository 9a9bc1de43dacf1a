#!/usr/bin/env bash
# All tests. The last lines are the test runner's own closing lines.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"

scripts/setup.sh test
log=$(mktemp)
trap 'rm -f "$log"' EXIT
code=0
cargo test --no-fail-fast 2>&1 | tee "$log" || code=$?
echo
echo "The test runner's closing lines:"
grep -E '^(test result:|error: .*(failed|could not))' "$log" || code=1
exit "$code"
