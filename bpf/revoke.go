package bpf

//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Werror -mcpu=v3" -target amd64 Revoke revoke.c -- -I/usr/include/x86_64-linux-gnu
