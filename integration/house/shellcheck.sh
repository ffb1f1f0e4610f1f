#!/usr/bin/env bash
# Runs shellcheck on every shell script of the repository.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! command -v shellcheck >/dev/null; then
	echo "!!! shellcheck: could not run: it is not installed (deploy/setup.sh installs it)"
	exit 0
fi
mapfile -t scripts < <(git ls-files --cached --others --exclude-standard '*.sh' .ci/run)
shellcheck "${scripts[@]}"
echo "shellcheck: ${#scripts[@]} scripts are clean"
