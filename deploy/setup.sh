#!/usr/bin/env bash
# Installs the Debian packages that building, testing and the demo need. It asks dpkg first, so that a second run is fast
# and needs no network. It starts no service and mounts nothing.
set -euo pipefail

# What the Go toolchain does not bring itself: the BPF and protobuf compilers, cgo for the race detector, and the programs
# that tests and the demo run.
packages=(
	ca-certificates git make gcc libc6-dev
	clang llvm libbpf-dev linux-libc-dev protobuf-compiler
	iproute2 iputils-ping netcat-openbsd nftables procps util-linux tcpdump iperf3
	postgresql postgresql-client jq shellcheck
	iptables qemu-system-x86 busybox-static wireguard-tools xz-utils bpftool
)

fail() {
	echo "setup: $*" >&2
	exit 1
}

command -v dpkg-query >/dev/null || fail "this is not Debian or a relative of it; install the equivalents of: ${packages[*]}"

missing=()
for package in "${packages[@]}"; do
	state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
	[ "$state" = installed ] || missing+=("$package")
done

if [ "${#missing[@]}" -gt 0 ]; then
	if [ "$(id -u)" -ne 0 ]; then
		fail "these packages are missing and only root can install them: ${missing[*]}"
	fi
	# A new PostgreSQL package makes and starts a cluster unless it is told not to. The demo makes its own; what is on the
	# machine already is left as it is.
	dropins=/etc/postgresql-common/createcluster.d
	if [ ! -d "$dropins" ]; then
		mkdir -p "$dropins"
		trap 'rm -f "$dropins/signet-setup.conf"; rmdir --ignore-fail-on-non-empty "$dropins"' EXIT
	else
		trap 'rm -f "$dropins/signet-setup.conf"' EXIT
	fi
	echo "create_main_cluster = false" >"$dropins/signet-setup.conf"

	echo "setup: installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

command -v go >/dev/null || fail "the Go toolchain is missing: go.mod names the version; Debian's may be too old, so it is left to you"
