// Package tutorial runs the commands of docs/tutorial.md as they stand there, on hosts made of namespaces. Each host has
// a shell that lives as long as the test, and sees its own /etc/signet, /var/lib, /run, bpffs and cgroup root at the
// places that the page names.
package tutorial
