// Package attack is what a hostile process does to reach what it may not, or to pass for somebody else. Each attack is a
// Spec, and the same Spec is the control when the rightful workload runs it.
//
// It owns the process's system calls and nothing else: packets come ready made (integration/probe/forge), and who the
// process is, its user, cgroup and namespace, is the caller's business. What happened is told in lines on the output:
//
//	step NAME ok | step NAME ERRNO   one for each system call that could be refused; the first refusal ends the attack
//	local ADDR:PORT                  the source that the kernel chose
//	opened                           where the Spec says to wait: a line on the input lets it go on
//	end                              the attack ran to its end, refused or not
//
// Start at attack.go; witness.go is the other side, that which must see nothing.
package attack
