// Package bpf holds the judge in the kernel: C sources, the objects compiled from them, and the Go types of everything
// that they share with the agent. It loads and attaches nothing; dataplane/enforce does.
//
// The meaning of the programs is internal/policy.Judge. Start at judge.c, whose numbered steps are the same; lib/maps.h
// and lib/ct.h say what lives in maps and who may write what.
//
// The objects and the Go files judge_*.go and judgetest_*.go are generated; go generate makes them again. The second
// object is the same source compiled for tests: it takes the time and the socket from a map, and is loaded by no agent.
// twin_*.go is the same without any write, and answers signet explain.
package bpf

//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Werror -mcpu=v3" -target amd64 -type tuple -type settings -type view -type addr_key -type addr -type local_key -type own_key -type own -type entry_key -type entry -type ruleset -type range_key -type window -type iface_key -type tuple4 -type conn -type fragment_key -type fragment -type event Judge judge.c -- -I/usr/include/x86_64-linux-gnu
//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Werror -mcpu=v3 -DSIGNET_TEST" -target amd64 -type test_input -type test_output JudgeTest judge.c -- -I/usr/include/x86_64-linux-gnu
