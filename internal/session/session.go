// Package session runs one WebSocket connection from the moment both legs are
// up until both are closed. It knows nothing of HTTP or configs: a leg is a byte
// stream, the settings are asked for when they are needed, and the record in the
// registry is the one thing it shares.
//
// Two goroutines, the uplink and the downlink, each read one leg and are the
// only writers of the other, so no frame ever lands inside another and writing
// takes no lock. Whoever else wants something written (the clock a ping, the
// admin API a close frame) leaves it with the leg and wakes the goroutine that
// writes there, by a read deadline in the past.
//
// Session.mu guards what is left with the legs and the phase; it is never held
// over I/O. The clock is one timer; it only looks, decides and leaves work.
//
// Invariants:
//   - The record's Close decides that and why a session ends; End only carries
//     it out. There is no other way to end.
//   - A pump leaves only when its source has nothing more to say and its
//     destination was told the end, or is gone.
//   - After a close frame nothing more is written to that leg.
//   - Run returns when both pumps have left and both legs are closed; only then
//     is the record Done.
package session

import (
	"crypto/rand"
	"io"
	weakrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// Conn is what a leg is made of: a hijacked connection, a stream of HTTP/2, an
// in-memory pipe. A deadline in the past must wake a Read that blocks, and must
// not lose bytes; a Read after it was lifted goes on.
type Conn interface {
	io.ReadWriteCloser
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}

// Settings are what a route says about its live sessions. Zero turns a limit off.
type Settings struct {
	PingInterval     time.Duration // heartbeats on each leg, up to 10 % sooner
	PingTimeout      time.Duration // silence after a heartbeat that means dead
	IdleTimeout      time.Duration // no data frame either way
	FirstDataTimeout time.Duration // open, but never a data frame
	MaxLifetime      time.Duration // up to 10 % sooner
	WriteTimeout     time.Duration // the peer's kernel takes not one byte
}

// Peer is one side of a session to be.
type Peer struct {
	Conn Conn
	// Early is what was read together with the peer's handshake.
	Early []byte
}

// Session is one connection between a client and a backend.
type Session struct {
	rec      *registry.Conn
	upstream *registry.Upstream
	settings func() Settings

	legs   [2]leg
	nonce  [8]byte // payload of the session's own pings
	jitter float64 // 0 … 0.1, what lifetime and heartbeats are shortened by

	// drowsy is set while the clock sleeps for longer than activePeriod.
	drowsy atomic.Bool

	mu         sync.Mutex
	timer      *time.Timer
	closing    bool
	closingBy  time.Duration // on the session's clock
	finished   bool
	lifeBegins time.Duration
}

// New makes the session of a connection whose handshakes are done. compressed
// says that permessage-deflate is agreed. The legs are the session's from now on.
func New(rec *registry.Conn, upstream *registry.Upstream, settings func() Settings, client, backend Peer, compressed bool) *Session {
	s := &Session{rec: rec, upstream: upstream, settings: settings, jitter: weakrand.Float64() / 10}
	rand.Read(s.nonce[:])
	for side, peer := range [2]Peer{clientSide: client, backendSide: backend} {
		l := &s.legs[side]
		l.side, l.conn = uint8(side), peer.Conn
		l.in.Init(side == clientSide, compressed)
		l.in.Preload(peer.Early)
	}
	s.timer = time.AfterFunc(dormant, s.tick)
	return s
}

// Run relays until the end and returns when nothing of the connection is left.
// It is called once, after the record was opened with s as its owner.
func (s *Session) Run() {
	// Caddy may have armed one after the hijack: its flush at the end of a request
	// does, with write_timeout. (The clock bounds an end that came before this.)
	for side := range s.legs {
		_ = s.legs[side].conn.SetWriteDeadline(time.Time{})
	}
	s.mu.Lock()
	s.lifeBegins = s.now()
	s.mu.Unlock()
	s.Reconsider()

	down := make(chan struct{})
	go s.downlink(down)
	s.pump(s.client(), s.backend(), registry.In)
	<-down
	s.finish()
}

// downlink owns reading the backend and writing to the client. It ends with the
// backend's last byte, or when the clock gives the backend up, and closes down.
func (s *Session) downlink(down chan<- struct{}) {
	defer close(down)
	s.pump(s.backend(), s.client(), registry.Out)
}

// finish closes both legs and the record.
func (s *Session) finish() {
	s.mu.Lock()
	s.finished = true
	s.timer.Stop()
	s.mu.Unlock()
	for side := range s.legs {
		s.legs[side].close()
	}
	s.rec.Done()
}

// Abort cuts both legs. The pumps find that out by themselves.
func (s *Session) Abort() {
	for side := range s.legs {
		s.legs[side].cut()
	}
}

// Reconsider lets the clock look at the session now: the route's settings or
// the planned end have changed.
func (s *Session) Reconsider() { s.lookIn(0) }

// lookIn lets the clock look again after d.
func (s *Session) lookIn(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		d = min(d, closingPeriod)
	}
	if !s.finished {
		s.timer.Reset(d)
	}
}

func (s *Session) client() *leg       { return &s.legs[clientSide] }
func (s *Session) backend() *leg      { return &s.legs[backendSide] }
func (s *Session) other(l *leg) *leg  { return &s.legs[1-l.side] }
func (s *Session) now() time.Duration { return s.rec.Age() + 1 } // never 0

// sooner shortens d by the session's share of up to 10 %, so that connections
// that began together do not end or ping together.
func (s *Session) sooner(d time.Duration) time.Duration {
	return d - time.Duration(s.jitter*float64(d))
}
