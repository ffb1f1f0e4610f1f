package bpf

//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Werror -mcpu=v3 -DSIGNET_TEST -DSIGNET_TWIN" -target amd64 -type test_input -type test_output -type twin_flow Twin judge.c -- -I/usr/include/x86_64-linux-gnu
