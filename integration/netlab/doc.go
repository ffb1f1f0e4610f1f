// Package netlab makes hosts out of Linux namespaces for tests and for the demo.
//
// A Lab owns everything that carries its prefix: network namespaces below /run/netns, one cgroup v2 subtree, one bpffs
// mount, and the processes started through it. A Host is one network namespace with a cgroup root, a bpffs directory and
// a state directory of its own, so that several agents can run on one machine without seeing each other. A Bridge is an
// Ethernet switch in a namespace of its own: nothing here touches the links, routes or rules of the machine itself.
//
// What it does not own: the programs that run on the hosts, and what they write below the work directory. It does not make
// routers, NATs, or loss and delay.
//
// Two properties matter to callers. A process started with Host.Command is inside its namespace and its cgroup before its
// first instruction, so no socket of it was ever made elsewhere. And Lab.Close gives back all of it, or says what is left;
// the leftovers of a run that crashed are removed by the next New with the same prefix. The one thing that stays is the
// mount of /run/netns on itself, which "ip netns" shares with everybody on the machine.
//
// A person enters a host with the line that Host.Enter prints. "ip netns exec" is of no use here: it mounts a fresh /sys
// and so hides cgroup v2 and bpffs.
//
// Start reading at lab.go (New, Close), then host.go and cmd.go.
package netlab
