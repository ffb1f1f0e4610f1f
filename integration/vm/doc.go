// Package vm runs this repository's test binaries on other kernels than the one of this machine: it boots a kernel of
// Debian's archive under QEMU, without KVM and without a disk, and reads from a serial port what the tests said.
//
// It owns four steps, each of which can be used by itself:
//
//  1. Fetch finds the newest kernel of a series in the apt archive and unpacks it into a cache.
//  2. Build makes static test binaries of packages.
//  3. Image holds what the guest finds in its memory: the binaries, programs such as ip and nft with their libraries,
//     kernel modules, and a first process that mounts, loads, runs and powers off (init.sh).
//  4. Run boots the image and returns a Report with one Test for each test of each binary.
//
// TestMatrix puts them together; "make test-vm" runs it. A new package joins the matrix as a line in matrixPackages
// (matrix_test.go); what it needs to run as root with the working directory of its sources, it has in the guest too, but
// for the Go toolchain and a network.
//
// The guest is slow: every instruction is translated. A test that passes there has no deadline that only a fast machine
// meets.
package vm
