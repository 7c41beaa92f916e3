// Package session runs one WebSocket connection from the moment both legs are
// up until nothing of it is left: over any number of backends, one after the
// other. It knows nothing of HTTP or configs: a leg is a byte stream, the route is
// asked for settings and for other backends, and the record in the registry is
// the one thing it shares.
//
// Two goroutines, the uplink and the downlink, are the only ones that write to
// a backend and to the client, so no frame ever lands inside another and writing
// takes no lock. Whoever else wants something written (the clock a ping, the
// admin API a close frame) leaves it with the leg and wakes the goroutine that
// writes there, by a read deadline in the past, or by Session.changed if it
// waits for something else than bytes. A third goroutine, the seeker, exists
// while another backend is looked for.
//
// Session.mu guards what is left with the legs, the phase, and what is kept for
// the next backend; it is never held over I/O. The clock is one timer; it only
// looks, decides and leaves work.
//
// Invariants:
//   - The record's Close decides that and why a session ends; End only carries
//     it out. There is no other way to end.
//   - A leg is one connection. A backend leg is lost once, by lose; what the lost
//     backend had is settled once, by the uplink, which alone writes to it; only
//     then may another leg take over.
//   - The downlink reads a lost leg to its end before it reads the next one.
//   - A pump leaves only when its source has nothing more to say and its
//     destination was told the end, or is gone.
//   - After a close frame nothing more is written to that leg.
//   - Run returns when both pumps and the seeker have left and all legs are
//     closed; only then is the record Done.
package session

import (
	"context"
	"crypto/rand"
	"io"
	weakrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// Conn is what a leg is made of: a hijacked connection, a stream of HTTP/2, an
// in-memory pipe. A deadline in the past must wake a Read that blocks, and must
// not lose bytes; a Read after it was lifted goes on.
type Conn interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}

// Peer is one side of a session to be.
type Peer struct {
	Conn Conn
	// Early is what was read together with the peer's handshake.
	Early []byte
}

// Session is one connection between a client and its backends.
type Session struct {
	rec        *registry.Conn
	route      Route
	compressed bool

	client  leg
	current atomic.Pointer[leg] // the backend's leg, the latest one; changed under mu
	up      upstroke
	own     ownPings
	jitter  float64 // 0 … 0.1, what lifetime and heartbeats are shortened by
	tasks   sync.WaitGroup

	// drowsy is set while the clock sleeps for longer than activePeriod.
	drowsy atomic.Bool
	// Something is left for the uplink, or for the downlink.
	upWork, downWork atomic.Bool

	mu         sync.Mutex
	changed    sync.Cond // for pumps that wait for something else than bytes
	timer      *time.Timer
	lookAt     time.Duration // when the clock looks next
	reading    *leg          // what the downlink reads
	closing    bool
	closingBy  time.Duration // on the session's clock
	finished   bool
	lifeBegins time.Duration

	queue     replay.Queue
	pings     replay.Pings  // those on their way to the current backend
	pongs     [][]byte      // answers to the client's pings, for the downlink
	paused    bool          // the uplink waits for room, or for a backend
	fullAt    time.Duration // since when the queue has no room though there is a backend
	ackedAt   time.Duration // when the queue was last told of an acknowledgement
	heldAt    time.Duration
	inDoubt   int    // messages that may be repeats for the next backend
	suspect   bool   // one of them may be what breaks backends
	acquitted func() // ends the probation with the current backend; nil: none
	flaps     int    // backends in a row that were lost soon
	search    search

	moveAfter time.Duration // a planned move is not tried before
}

// New makes the session of a connection whose handshakes are done. compressed
// says that permessage-deflate is agreed. The legs are the session's from now on.
func New(rec *registry.Conn, route Route, upstream *registry.Upstream, client, backend Peer, compressed bool) *Session {
	s := &Session{rec: rec, route: route, compressed: compressed, jitter: weakrand.Float64() / 10, lookAt: never}
	s.changed.L = &s.mu
	rand.Read(s.own.nonce[:])
	s.queue.Init(rec.ReplayMemory())
	s.client.init(clientSide, client, compressed)
	s.reading = s.newBackend(upstream, backend)
	s.current.Store(s.reading)
	s.timer = time.AfterFunc(never, s.tick)
	return s
}

func (s *Session) newBackend(upstream *registry.Upstream, peer Peer) *leg {
	l := &leg{upstream: upstream}
	l.init(backendSide, peer, s.compressed)
	return l
}

// Run relays until the end and returns when nothing of the connection is left.
// It is called once, after the record was opened with s as its owner.
func (s *Session) Run() {
	// Caddy may have armed one after the hijack: its flush at the end of a request
	// does, with write_timeout. (The clock bounds an end that came before this.)
	_ = s.client.conn.SetWriteDeadline(time.Time{})
	_ = s.backend().conn.SetWriteDeadline(time.Time{})
	s.mu.Lock()
	s.lifeBegins = s.now()
	s.mu.Unlock()
	s.Reconsider()

	down := make(chan struct{})
	go s.downlink(down)
	s.uplink()
	<-down
	s.finish()
}

// finish closes both legs and the record.
func (s *Session) finish() {
	s.mu.Lock()
	s.finished = true
	s.timer.Stop()
	s.mu.Unlock()
	s.tasks.Wait()
	s.client.close()
	s.backend().close()
	s.mu.Lock()
	s.queue.Drop()
	s.acquit()
	s.mu.Unlock()
	s.rec.Done()
}

// Abort cuts all legs. The pumps find that out by themselves.
func (s *Session) Abort() {
	s.mu.Lock()
	reading := s.reading
	s.search.cancel()
	s.mu.Unlock()
	s.client.cut()
	s.backend().cut()
	reading.cut()
}

// Reconsider lets the clock look at the session now: the route's settings or
// what is planned have changed.
func (s *Session) Reconsider() { s.lookIn(0) }

// lookIn lets the clock look after d, if it would not sooner.
func (s *Session) lookIn(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lookSoon(d)
}

// lookSoon is lookIn with Session.mu held.
func (s *Session) lookSoon(d time.Duration) {
	if s.closing {
		d = min(d, closingPeriod)
	}
	d = max(d, 0)
	if at := s.now() + d; !s.finished && at < s.lookAt {
		s.lookAt = at
		s.timer.Reset(d)
	}
}

// wakeUplink makes the uplink look for work.
func (s *Session) wakeUplink() {
	s.upWork.Store(true)
	_ = s.client.conn.SetReadDeadline(past)
	s.changed.Broadcast()
}

// wakeDownlink makes the downlink look for work. Session.mu is held.
func (s *Session) wakeDownlink() {
	s.downWork.Store(true)
	_ = s.reading.conn.SetReadDeadline(past)
	s.changed.Broadcast()
}

// wakeWriter wakes the pump that writes l. Session.mu is held.
func (s *Session) wakeWriter(l *leg) {
	if l.side == clientSide {
		s.wakeDownlink()
	} else {
		s.wakeUplink()
	}
}

func (s *Session) backend() *leg { return s.current.Load() }

// other is the leg that l's frames go to, or come from.
func (s *Session) other(l *leg) *leg {
	if l.side == clientSide {
		return s.backend()
	}
	return &s.client
}

func (s *Session) now() time.Duration { return s.rec.Age() + 1 } // never 0

// sooner shortens d by the session's share of up to 10 %, so that connections
// that began together do not end or ping together.
func (s *Session) sooner(d time.Duration) time.Duration {
	return d - time.Duration(s.jitter*float64(d))
}

// search is what the seeker and the others know of each other; guarded by
// Session.mu.
type search struct {
	under  bool               // a seeker exists
	stop   context.CancelFunc // ends it
	events chan struct{}      // wakes it while it moves the session; one is enough
	hurry  context.CancelFunc // ends the dials of a move
	halt   bool               // the old backend is to get no further message
	halted bool               // … and got its last one whole
	found  *Found             // the backend that is to take over from a live one
}

// cancel ends the seeker. Session.mu is held.
func (q *search) cancel() {
	if q.stop != nil {
		q.stop()
	}
}

// notify tells the seeker that something has changed. Session.mu is held.
func (q *search) notify() {
	select {
	case q.events <- struct{}{}:
	default: // it has not looked since the last one, or there is none
	}
}
