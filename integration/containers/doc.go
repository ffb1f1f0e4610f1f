// Package containers tests workloads that are containers or network namespaces, on whole hosts: a container is a process
// in a network namespace and a cgroup of its own, with a veth to its host, as docs/containers.md sets one up.
//
// It has no code of its own. No container runtime runs: the files that one keeps of its containers are written by the
// tests, in Docker's form.
package containers
