package main

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
)

// ticksPerSecond is USER_HZ, which Linux fixes at 100 for /proc on every architecture that we run on.
const ticksPerSecond = 100

// ratioBound is the geometric mean of the ratios and the lower end of its two-sided 95 % interval, by Student's t on
// the logarithms: the samples are pairs, so what both sides of a pair suffer cancels.
func ratioBound(ours, theirs []float64) (mean, lower float64) {
	n := float64(len(ours))
	logs := make([]float64, len(ours))
	sum := 0.0
	for i := range ours {
		logs[i] = math.Log(ours[i] / theirs[i])
		sum += logs[i]
	}
	m, ss := sum/n, 0.0
	for _, l := range logs {
		ss += (l - m) * (l - m)
	}
	se := math.Sqrt(ss/(n-1)) / math.Sqrt(n)
	return math.Exp(m), math.Exp(m - student95(len(ours)-1)*se)
}

// student95 is the two-sided 95 % point of Student's t; beyond the table the value for 10 is used, which is on the
// cautious side.
func student95(freedom int) float64 {
	table := map[int]float64{1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
	if t, ok := table[freedom]; ok {
		return t
	}
	return table[10]
}

// percentile of samples by nearest rank.
func percentile(samples []float64, p float64) float64 {
	s := slices.Clone(samples)
	slices.Sort(s)
	return s[max(0, int(math.Ceil(p/100*float64(len(s))))-1)]
}

// cpuSeconds is the user and system time of a process so far (proc(5), fields utime and stime).
func cpuSeconds(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read CPU time: %w", err)
	}
	// The name stands in parentheses and may hold anything; fields are counted from behind it.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, errNoSample
	}
	user, err1 := strconv.ParseFloat(fields[11], 64)
	system, err2 := strconv.ParseFloat(fields[12], 64)
	if err1 != nil || err2 != nil {
		return 0, errNoSample
	}
	return (user + system) / ticksPerSecond, nil
}

// rssMiB is the resident memory of a process (proc(5), VmRSS).
func rssMiB(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("read memory: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmRSS: %f kB", &kib); n == 1 {
			return kib / 1024, nil
		}
	}
	return 0, errNoSample
}
