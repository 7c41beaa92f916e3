// Package tunnel relays one passthrough connection, from the moment both legs
// are up until nothing of it is left. It never looks at the bytes. It knows no
// config: the route is asked for settings, and the record in the registry is the
// one thing it shares.
//
// Two goroutines, the pumps, each relay one way: they alone read one leg and
// write the other. While a pump waits for bytes it holds neither a pipe nor a
// buffer. The clock is one timer; it looks, decides and wakes, and never blocks.
//
// Tunnel.mu guards the phase and what is known of the legs. It is never held over
// I/O; questions to the kernel that do not block are allowed.
//
// Invariants:
//   - The record's Close decides that and why a tunnel ends; End only carries it
//     out. There is no other way to end.
//   - A leg is told the end (FIN) at most once, by the pump that writes to it,
//     after everything that was read for it.
//   - A leg whose stream is cut short never gets a FIN for it, but a reset: what
//     is inside must not take a truncation for an end.
//   - Run returns when both pumps have left and both legs are closed; only then is
//     the record Done.
package tunnel

import (
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// past is a deadline that wakes a read at once.
var past = time.Unix(1, 0)

var errNotMovable = errors.New("a passthrough connection cannot be moved")

// Tunnel is one connection between a client and a backend. Durations since are
// on the tunnel's own clock, the age of its record; 0 is never.
type Tunnel struct {
	rec    *registry.Conn
	route  Route
	jitter float64 // 0 … 0.1: connections that began together do not end together

	client, backend leg
	up, down        pump
	pumps           sync.WaitGroup // the second one; the first is Run itself

	ending  atomic.Bool  // closing, for the pumps
	drowsy  atomic.Bool  // the clock sleeps for longer than activePeriod
	pending atomic.Int64 // since when bytes of the client are unanswered

	mu         sync.Mutex
	timer      *time.Timer
	lookAt     time.Duration // when the clock looks next
	applied    *Settings     // what the sockets were told
	lifeBegins time.Duration
	eofAt      time.Duration // when the first side was seen to have ended
	warnedAt   time.Duration // when it was warned that the tunnel is inactive
	closing    bool
	abortive   bool // a leg has broken; the other one gets a reset
	closingBy  time.Duration
	flushed    chan struct{} // closed when the reset may go out; nil: nobody waits
	finished   bool
}

// New makes the tunnel of a connection. early is what the client has sent
// already, and is relayed first. The connections are the tunnel's from now on;
// deadlines that others left on them are cleared.
func New(rec *registry.Conn, route Route, client, backend net.Conn, early []byte) *Tunnel {
	t := &Tunnel{rec: rec, route: route, jitter: rand.Float64() / 10, lookAt: dormant}
	t.client.init(client)
	t.backend.init(backend)
	t.up = pump{t: t, from: &t.client, to: &t.backend, way: registry.In, early: early}
	t.down = pump{t: t, from: &t.backend, to: &t.client, way: registry.Out}
	t.lifeBegins = t.now()
	t.timer = time.AfterFunc(dormant, t.tick)
	return t
}

// Run relays until the end and returns when nothing of the connection is left.
// It is called once, after the record was opened with t as its owner.
func (t *Tunnel) Run() {
	t.Reconsider()
	t.pumps.Go(t.down.run)
	t.up.run()
	t.pumps.Wait()
	t.finish()
}

// Abort cuts both legs. The pumps find that out by themselves. If both streams are
// complete there is nothing to cut: the peers get what the kernel still has for them.
func (t *Tunnel) Abort() {
	t.mu.Lock()
	complete := t.complete()
	t.mu.Unlock()
	t.client.cut(!complete)
	t.backend.cut(!complete)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.noMoreFlushing()
}

// Reconsider lets the clock look at the tunnel now: the route's settings or what
// is planned have changed.
func (t *Tunnel) Reconsider() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lookIn(0)
}

// Move refuses: nobody can take over in the middle of a stream that only its two
// ends can read.
func (t *Tunnel) Move() error { return errNotMovable }

func (t *Tunnel) now() time.Duration { return t.rec.Age() + 1 } // never 0

var _ registry.Owner = (*Tunnel)(nil)
