package session_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-overlay/signet/coordinator/registry"
	"github.com/signet-overlay/signet/coordinator/session"
	"github.com/signet-overlay/signet/internal/identity"
	"github.com/signet-overlay/signet/proto/signetv1"
)

// halfSent announces a message and sends only a part of it. The answer's gRPC code comes when the server gives one.
func (r *rig) halfSent(method string) <-chan string {
	cfg := identity.PinnedTLS(r.auth.Bundle().Pin())
	cfg.NextProtos = []string{"h2"}
	tr := &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}
	pr, pw := io.Pipe()
	req := must(http.NewRequestWithContext(r.t.Context(), http.MethodPost, "https://"+r.addr+method, pr))(r.t)
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	go func() {
		_, _ = pw.Write(binary.BigEndian.AppendUint32([]byte{0}, 900<<10))
		_, _ = pw.Write(make([]byte, 100)) // and no more
	}()
	out := make(chan string, 1)
	go func() {
		defer tr.CloseIdleConnections()
		resp, err := tr.RoundTrip(req)
		if err != nil {
			out <- err.Error()
			return
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		_ = pw.Close()
		out <- resp.Header.Get("Grpc-Status") + resp.Trailer.Get("Grpc-Status")
	}()
	return out
}

func TestHalfSentRequestsAreCut(t *testing.T) {
	const limit = 500 * time.Millisecond
	r := newRig(t, func(o *options) {
		o.config = func(c *session.Config) { c.EnrolTimeout, c.MaxBodies = limit, 4 }
	})
	begin := time.Now()
	var answers []<-chan string
	for _, m := range []string{signetv1.Enrolment_Enrol_FullMethodName, signetv1.Enrolment_Renew_FullMethodName, signetv1.Enrolment_Enrol_FullMethodName} {
		answers = append(answers, r.halfSent(m))
	}
	got := map[string]int{}
	for _, a := range answers {
		select {
		case code := <-a:
			got[code]++
		case <-time.After(patience):
			t.Fatal("a request that never arrives holds its place")
		}
	}
	// One source may hold half of the places: two of the three, whichever came first.
	if got[fmt.Sprint(uint32(codes.Canceled))] != 2 || got[fmt.Sprint(uint32(codes.ResourceExhausted))] != 1 {
		t.Errorf("answers %v", got)
	}
	if d := time.Since(begin); d < limit || d > limit+3*time.Second {
		t.Errorf("it took %v", d)
	}
	r.enrolled("api-1") // and every place is free again
}

// A burst of hosts behind one address is the usual first day, and none of them may be turned away for good.
func TestABurstOfEnrolmentsPasses(t *testing.T) {
	r := newRig(t)
	const n = 500
	secret := r.token(registry.TokenRequest{Node: "*", Uses: n})
	var wg sync.WaitGroup
	var mu sync.Mutex
	refused := map[codes.Code]int{}
	for i := range n {
		h := r.newHost(fmt.Sprintf("api-%d", i))
		wg.Go(func() {
			for range 20 {
				_, err := h.enrol(secret)
				if err == nil {
					return
				}
				mu.Lock()
				refused[status.Code(err)]++
				mu.Unlock()
				if c := status.Code(err); c != codes.ResourceExhausted && c != codes.Unavailable && c != codes.DeadlineExceeded {
					break // an agent asks again only after these
				}
			}
			t.Errorf("%s is not enrolled", h.name)
		})
	}
	wg.Wait()
	t.Logf("%d enrolments at once; refused at first: %v", n, refused)
}

func TestStrangersConnectionsEnd(t *testing.T) {
	const life = 200 * time.Millisecond
	r := newRig(t, func(o *options) {
		o.config = func(c *session.Config) { c.StrangerLife = life }
	})
	l := r.enrolled("api-1").connect()
	l.update()
	cfg := identity.PinnedTLS(r.auth.Bundle().Pin())
	cfg.NextProtos = []string{"h2"}
	c := must(tls.Dial("tcp", r.addr, cfg))(t)
	defer c.Close()
	begin := time.Now()
	_ = c.SetReadDeadline(begin.Add(patience))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > patience/2 {
		t.Errorf("a connection without a certificate ended after %v: %v", time.Since(begin), err)
	}
	// One that enrols just then has as long again, and one with a certificate stays.
	begin = time.Now()
	if answer := <-r.halfSent(signetv1.Enrolment_Enrol_FullMethodName); time.Since(begin) < 2*life-50*time.Millisecond {
		t.Errorf("a connection that enrols ended after %v: %s", time.Since(begin), answer)
	}
	l.ack("")
	r.apply(document + hookRule)
	l.update()
}

func TestHelloWithoutSectionsBringsEverything(t *testing.T) {
	r := newRig(t)
	l := r.enrolled("api-1").connect()
	l.update()
	wake, cancel := r.srv.Watch()
	defer cancel()
	l.ack("")
	r.eventually("the report arrives", wake, func() bool { return r.srv.Reports()["api-1"].Epoch == l.h.held.Epoch() })
	l.close()
	// What an agent does whose list would be larger than a message may be.
	conn := l.h.client()
	defer conn.Close()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	stream := must(signetv1.NewMeshClient(conn).Sync(ctx))(t)
	_ = stream.Send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{Epoch: l.h.held.Epoch(), WireguardKey: l.h.wg.Bytes()}}})
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if u := m.GetUpdate(); u != nil {
			if len(u.Sections) != len(l.h.held.Sections()) {
				t.Errorf("%d of %d sections came", len(u.Sections), len(l.h.held.Sections()))
			}
			return
		}
	}
}

// A host that was replaced may have opened its stream before and say Hello after.
func TestAReplacedHostsLateHelloIsRefused(t *testing.T) {
	r := newRig(t)
	old := r.enrolled("api-1")
	conn := old.client()
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream := must(signetv1.NewMeshClient(conn).Sync(ctx))(t)
	select {
	case <-r.checked: // the key was good, and now Hello is awaited
	case <-ctx.Done():
		t.Fatal("the stream was never looked at")
	}
	fresh := r.newHost("api-1")
	if _, err := fresh.enrol(r.token(registry.TokenRequest{Node: "api-1", Replace: true})); err != nil {
		t.Fatal(err)
	}
	// WireGuard keys are public: the old host may know the new one's.
	_ = stream.Send(&signetv1.AgentMessage{Message: &signetv1.AgentMessage_Hello{Hello: &signetv1.Hello{WireguardKey: fresh.wg.Bytes()}}})
	m, err := stream.Recv()
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("the retired key's stream got %v, %v", m, err)
	}
	if n := len(r.srv.Connected()); n != 0 {
		t.Errorf("%d streams", n)
	}
}

func TestTheFormerKeyIsSpentOnceTheCurrentOneIsSeen(t *testing.T) {
	r := newRig(t)
	h, former := r.enrolled("api-1"), r.newHost("api-1")
	former.use(h.svid().Certificate, h.priv)
	key := func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t) }
	with := func(k *ecdsa.PrivateKey) error { // renews with the former key, and forgets the answer
		again := r.newHost("api-1")
		again.use(former.svid().Certificate, former.priv)
		return again.renew(k)
	}
	if err := with(key()); err != nil {
		t.Fatal(err)
	}
	if err := h.renew(key()); err != nil { // the reply was lost: the former key asks again
		t.Fatalf("the former key was not seen to be spent yet: %v", err)
	}
	h.connect().update()
	if n := r.reg.State().Nodes["api-1"]; n.PrevSPKI != [32]byte{} {
		t.Error("the former key is still good after the current one was seen")
	}
	hasPrefix(t, with(key()), codes.PermissionDenied)
	if code, _ := former.connect().end(); code != codes.PermissionDenied {
		t.Errorf("a stream with the former key: %v", code)
	}
	before := r.proofs.Load()
	h.connect().update()
	if r.proofs.Load() != before {
		t.Error("a stream with nothing to retire writes to the store")
	}
}
