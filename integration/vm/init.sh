#!/bin/busybox sh
# shellcheck shell=sh
# The first and only process of a guest. It mounts what a host has, loads the modules, runs the plan and powers off.
# What it says to descriptor 3 goes to the second serial port and is read by the package vm; the first port is the
# kernel's console, so that the two never mix.
/bin/busybox mkdir -p /proc
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp USER=root LC_ALL=C

mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

# The port neither changes ends of lines nor waits for a slow line to drain.
stty -F /dev/ttyS1 115200 raw -echo
exec 3>/dev/ttyS1 2>/dev/console </dev/null

say() { printf '\n##signet-vm %s\n' "$*" >&3; }

stop() {
	sync
	poweroff -f
	# Without ACPI the machine only stops; a reset ends it too.
	reboot -f
}

must() {
	"$@" && return
	say "broken $*"
	stop
}

must mkdir -p /dev/pts /dev/shm /tmp /run /root /var/lib
must mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
must mount -t tmpfs tmpfs /dev/shm
must mount -t tmpfs -o mode=1777 tmpfs /tmp
must mount -t tmpfs tmpfs /run
must mount -t cgroup2 cgroup2 /sys/fs/cgroup
must mount -t bpf bpf /sys/fs/bpf
must mount -t securityfs securityfs /sys/kernel/security
must mount -t debugfs debugfs /sys/kernel/debug
must mount -t tracefs tracefs /sys/kernel/tracing
must ln -sf /proc/self/fd /dev/fd
must ln -sf fd/0 /dev/stdin
must ln -sf fd/1 /dev/stdout
must ln -sf fd/2 /dev/stderr
must ip link set lo up
must hostname guest

for module in /signet/modules/*; do
	must insmod "$module"
done
if ! [ -e /dev/net/tun ]; then
	must mkdir -p /dev/net
	must mknod /dev/net/tun c 10 200
fi

# run NAME DIRECTORY SECONDS PROGRAM ARGUMENTS... runs one binary. The program has a shorter limit of its own and then
# says where it hangs; this one is for a program that cannot.
run() {
	name=$1
	limit=$3
	cd "$2" || return
	shift 3
	say "begin $name"
	timeout -s KILL "$limit" "$@" >&3 2>&3 3>&-
	say "end $name $?"
}

SIGNET_VM_GUEST=$(uname -r)
export SIGNET_VM_GUEST
say "booted $SIGNET_VM_GUEST"
# shellcheck source=/dev/null
. /signet/plan
say "finished"
stop
