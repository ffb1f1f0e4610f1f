package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-overlay/signet/agent/session"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/internal/key"
)

// enrolLimit bounds one host's attempt.
const enrolLimit = 60 * time.Second

// enrol joins many hosts at once with one token, each with keys of its own, and prints how many were admitted:
//
//	probe enrol COORDINATOR TOKENFILE COUNT NAME
//
// NAME may hold %d for the number of the host; without it all claim the same name.
func enrol(ctx context.Context, args []string) error {
	count, err := strconv.Atoi(args[2])
	if err != nil || count < 1 || count > 10000 {
		return fmt.Errorf("count %q is not from 1 to 10000", args[2])
	}
	text, err := os.ReadFile(args[1])
	if err != nil {
		return err
	}
	token, err := identity.ParseJoinToken(strings.TrimSpace(string(text)))
	if err != nil {
		return err
	}
	hosts := make([]session.Application, count)
	for i := range hosts {
		name := args[3]
		if strings.Contains(name, "%d") {
			name = fmt.Sprintf(name, i+1)
		}
		if hosts[i], err = application(args[0], token, name); err != nil {
			return err
		}
	}
	var admitted, refused, failed atomic.Int64
	var all sync.WaitGroup
	start := time.Now()
	for _, h := range hosts {
		all.Go(func() {
			limited, cancel := context.WithTimeout(ctx, enrolLimit)
			defer cancel()
			_, err := session.Enrol(limited, h, slog.New(slog.DiscardHandler))
			switch {
			case err == nil:
				admitted.Add(1)
			case session.Permanent(err):
				refused.Add(1)
			default:
				failed.Add(1)
				fmt.Println("failed:", err)
			}
		})
	}
	all.Wait()
	fmt.Printf("admitted %d refused %d failed %d in %.3f s\n", admitted.Load(), refused.Load(), failed.Load(), time.Since(start).Seconds())
	return nil
}

func application(coordinator string, token identity.JoinToken, name string) (session.Application, error) {
	node, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return session.Application{}, fmt.Errorf("make key: %w", err)
	}
	wg, err := key.NewPrivate()
	if err != nil {
		return session.Application{}, err
	}
	return session.Application{Coordinators: []string{coordinator}, Token: token, Node: name, Key: node, WireGuard: wg.Public()}, nil
}
