#!/usr/bin/env bash
# Runs every fuzz target of the module for the given time, one after the other.
set -euo pipefail
cd "$(dirname "$0")/../.."
time=${1:-10s}

# "go test -list" prints the names of a package's targets and then a line "ok PACKAGE ...".
targets=$(go test -list '^Fuzz' ./... | awk '/^Fuzz/ {names[++n] = $1} /^ok/ {for (i = 1; i <= n; i++) print $2, names[i]; n = 0}')
if [ -z "$targets" ]; then
	echo "fuzz: no fuzz target found" >&2
	exit 1
fi
failed=0
while read -r package name; do
	echo "== $package $name for $time"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package" </dev/null || failed=$((failed + 1))
done <<<"$targets"
echo "fuzz: $(wc -l <<<"$targets") targets, $failed with findings"
[ "$failed" -eq 0 ]
