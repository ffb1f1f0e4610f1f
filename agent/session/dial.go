package session

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

const (
	// maxMessage bounds one message; a larger one ends the stream.
	maxMessage = 64 << 20
	// pingEvery finds a dead connection. The server's enforcement policy must allow it.
	pingEvery   = 30 * time.Second
	pingTimeout = 10 * time.Second
	// buffer is what a connection reads and writes at once. It is nearly always silent, and keeps its buffers for life.
	buffer = 8 << 10
	// callTimeout bounds one unary call, connecting included.
	callTimeout = 15 * time.Second
	dialTimeout = 5 * time.Second

	firstBackoff = 200 * time.Millisecond
	maxBackoff   = 30 * time.Second
	minWait      = 50 * time.Millisecond
	// stable is how long a stream must live before the next failure counts as the first.
	stable = time.Minute
)

// wire is one connection to one coordinator. why remembers what the check of its certificate said, because gRPC hands
// on only text.
type wire struct {
	*grpc.ClientConn
	addr string

	mu  sync.Mutex
	why error
}

// dial prepares a connection; nothing is sent before the first call, and no call is sent before the handshake with
// its check of the certificate is over.
func dial(addr string, cfg *tls.Config) (*wire, error) {
	w := &wire{addr: addr}
	check := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		err := check(cs)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.why = err
		return err
	}
	// passthrough hands the name to the dialer, which tries all of its addresses. A proxy of the environment is none
	// of the agent's business.
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithReadBufferSize(buffer), grpc.WithWriteBufferSize(buffer), // the write buffer is shared by default
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			d := net.Dialer{Timeout: dialTimeout}
			return d.DialContext(ctx, "tcp", addr)
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("prepare connection to coordinator %s: %w", addr, err)
	}
	w.ClientConn = conn
	return w, nil
}

// explain makes one plain error of what a call returned.
func (w *wire) explain(err error) error {
	if err == nil {
		return nil
	}
	w.mu.Lock()
	why := w.why
	w.mu.Unlock()
	if why != nil {
		return &Error{Coordinator: w.addr, Kind: Untrusted, Message: why.Error(), cause: why}
	}
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("ask coordinator %s: %w", w.addr, err)
	}
	st, ok := status.FromError(err)
	if !ok {
		return err // our own, not the wire's
	}
	return &Error{Coordinator: w.addr, Kind: kindOf(st.Code()), Message: plain(st.Message()), cause: err}
}

// plain takes gRPC's wrapping off what the network said.
func plain(message string) string {
	if quoted, ok := strings.CutPrefix(message, "connection error: desc = "); ok {
		if inner, err := strconv.Unquote(quoted); err == nil {
			message = inner
		}
	}
	message = strings.TrimPrefix(message, "transport: Error while dialing: ")
	return strings.TrimPrefix(message, "transport: authentication handshake failed: ")
}

// Kind says what may help after a failed call.
type Kind uint8

// The kinds.
const (
	Unreachable Kind = iota // try again later
	Refused                 // the coordinator understood and said no
	Untrusted               // whoever answered is not our coordinator
)

// Error is a failed conversation with a coordinator.
type Error struct {
	Coordinator string
	Kind        Kind
	Message     string
	cause       error
}

// Error is one plain sentence.
func (e *Error) Error() string {
	switch e.Kind {
	case Refused:
		return fmt.Sprintf("the coordinator at %s refused: %s", e.Coordinator, e.Message)
	case Untrusted:
		return fmt.Sprintf("whoever answers at %s is not the coordinator of this mesh: %s", e.Coordinator, e.Message)
	}
	return fmt.Sprintf("the coordinator at %s cannot be reached: %s", e.Coordinator, e.Message)
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.cause }

// Permanent reports whether asking again cannot help.
func Permanent(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind != Unreachable
}

func kindOf(c codes.Code) Kind {
	switch c {
	case codes.InvalidArgument, codes.AlreadyExists, codes.PermissionDenied, codes.FailedPrecondition,
		codes.Unauthenticated, codes.NotFound, codes.Unimplemented, codes.OutOfRange:
		return Refused
	}
	return Unreachable
}

// backoff draws a wait with full jitter, so that a fleet does not come back in step (attempt counts from 0).
func backoff(attempt int) time.Duration {
	limit := min(firstBackoff<<min(attempt, 10), maxBackoff)
	return max(rand.N(limit+1), minWait)
}

// pause waits for d, for a kick, or for the end of ctx.
func pause(ctx context.Context, d time.Duration, kick <-chan struct{}) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-kick:
		return nil
	case <-t.C:
		return nil
	}
}
