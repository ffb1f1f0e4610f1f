package bpf

//go:generate go tool bpf2go -cc clang -cflags "-O2 -g -Wall -Werror -mcpu=v3" -target amd64 Flood flood.c -- -I/usr/include/x86_64-linux-gnu

// What the flood guard counts, by index of its map of causes; TestFloodNumbers compares them with enum cause in flood.c.
const (
	FloodPassed     = 0 // of sound form, and within the rates
	FloodBadLength  = 1
	FloodBadType    = 2
	FloodRateSource = 3
	FloodRateGlobal = 4
	FloodCauses     = 5
)
