package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-overlay/signet/coordinator/api/apitypes"
	"github.com/signet-overlay/signet/integration/netlab"
	"github.com/signet-overlay/signet/integration/scenario"
)

const (
	policyChanges = 50
	enrolments    = 500
)

// policy measures from the moment a change is sent to the API until a host has it in its kernel: one
// sample for each change and host.
func (b *bench) policy(ctx context.Context) error {
	f, err := scenario.StartFleet(ctx, scenario.Options{Prefix: "benchpol", Dir: b.dir, Bin: b.bin}, fleetSize)
	if err != nil {
		return err
	}
	defer f.Close()
	api := f.API()
	var samples []float64
	for i := range policyChanges {
		sent := time.Now()
		revision, err := apply(ctx, f, api, scenario.FleetPolicy(8000, 9000+i))
		if err != nil {
			return err
		}
		hosts, err := rollout(ctx, f, api, revision)
		if err != nil {
			return err
		}
		for _, h := range hosts {
			samples = append(samples, h.Applied.Sub(sent).Seconds()*1000)
		}
		// A pause longer than the window in which the coordinator gathers changes: each change stands alone.
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	b.tell("policy/hosts=20/p50", percentile(samples, 50), "ms")
	b.atMost("policy/hosts=20/p99", percentile(samples, 99), "ms", 300)
	b.tell("policy/hosts=20/max", percentile(samples, 100), "ms")
	return nil
}

func apply(ctx context.Context, f *scenario.Fleet, api *http.Client, document string) (uint64, error) {
	body, err := json.Marshal(map[string]any{"files": []apitypes.File{{Name: "policy.yaml", Data: document}}})
	if err != nil {
		return 0, fmt.Errorf("encode policy: %w", err)
	}
	var out apitypes.PolicyApplied
	err = call(ctx, f, api, http.MethodPut, "policy", body, &out)
	return out.Revision, err
}

// rollout polls until every host has the revision; the times in it are the hosts' own, by the same clock.
func rollout(ctx context.Context, f *scenario.Fleet, api *http.Client, revision uint64) ([]apitypes.RolloutHost, error) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		var out apitypes.Rollout
		if err := call(ctx, f, api, http.MethodGet, fmt.Sprintf("policy/revisions/%d/rollout", revision), nil, &out); err != nil {
			return nil, err
		}
		done := 0
		for _, h := range out.Hosts {
			if h.Revision == revision {
				done++
			}
		}
		if done == fleetSize {
			return out.Hosts, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("revision %d is on %d of %d hosts after 10 s", revision, done, fleetSize)
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

func call(ctx context.Context, f *scenario.Fleet, api *http.Client, method, path string, body []byte, into any) error {
	req, err := f.APIRequest(ctx, method, path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	res, err := api.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer res.Body.Close()
	if res.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s", method, path, res.Status)
	}
	if err := json.NewDecoder(res.Body).Decode(into); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// enrol measures how long a storm of new hosts takes, each over a connection of its own.
func (b *bench) enrol(ctx context.Context) error {
	c, err := scenario.Start(ctx, scenario.Options{Prefix: "benchjoin", Dir: b.dir, Bin: b.bin})
	if err != nil {
		return err
	}
	defer c.Close()
	client, err := c.MakeHost(ctx, "storm")
	if err != nil {
		return err
	}
	token, err := c.Token(ctx, "load-*", "--uses", fmt.Sprint(enrolments))
	if err != nil {
		return err
	}
	file := filepath.Join(client.Dir(), "storm.token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		return fmt.Errorf("write token: %w", err)
	}
	out, err := client.Host.Command(ctx, netlab.Opts{}, c.Bin("probe"), "enrol", c.CoordinatorAddr().String(), file, fmt.Sprint(enrolments), "load-%d").Output()
	if err != nil {
		return err
	}
	var admitted, refused, failed int
	var seconds float64
	last := out[strings.LastIndex(strings.TrimSpace(out), "\n")+1:]
	if _, err := fmt.Sscanf(last, "admitted %d refused %d failed %d in %f s", &admitted, &refused, &failed, &seconds); err != nil || admitted != enrolments {
		return fmt.Errorf("not all hosts were admitted: %s", out)
	}
	b.atMost(fmt.Sprintf("enrol/hosts=%d", enrolments), seconds, "s", 5)
	return nil
}
