#!/usr/bin/env bash
# Writes the generated files anew, in place, and fails when that changes any of them. Which files are generated stands in
# .gitattributes. In a clean checkout this is what "git diff --exit-code" would say; with work in progress it still is right.
set -euo pipefail
cd "$(dirname "$0")/../.."

sums() {
	git ls-files -z --cached --others --exclude-standard |
		git check-attr -z --stdin linguist-generated |
		while IFS= read -r -d '' name && IFS= read -r -d '' _ && IFS= read -r -d '' value; do
			if [ "$value" = set ] && [ -f "$name" ]; then sha256sum "$name"; fi
		done
}

before=$(sums)
if [ -z "$before" ]; then
	echo "check-generated: no generated file found; .gitattributes names none that exists" >&2
	exit 1
fi
make --no-print-directory generate
after=$(sums)
if [ "$before" != "$after" ]; then
	echo "check-generated: these were not what their source gives; commit them as they are now:" >&2
	diff <(echo "$before") <(echo "$after") | awk '/^[<>]/ {print "  " $3}' | sort -u >&2
	exit 1
fi
echo "check-generated: $(wc -l <<<"$after") generated files are current"
