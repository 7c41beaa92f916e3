package session

import (
	"crypto/tls"
	"sync/atomic"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// The two sides of a session, as indexes of its legs.
const (
	clientSide = iota
	backendSide
)

// past is a deadline that wakes a Read at once.
var past = time.Unix(1, 0)

// leg is one peer's connection. Times are on the session's clock; 0 is never.
type leg struct {
	side uint8
	conn Conn

	in frame.Reader // used by the pump that reads the leg

	// Written by the pumps, read by the clock.
	reading   atomic.Int64 // since when the leg is being read without a break
	lastRead  atomic.Int64 // when the last byte came
	writing   atomic.Int64 // when the Write in progress began
	unpassed  atomic.Int64 // bytes read, and not yet part of the Write in progress
	pingBegan atomic.Int64 // when writing the oldest unanswered ping began …
	pingDone  atomic.Int64 // … and when it had been written
	work      atomic.Bool  // something is left in what follows

	// Left with the leg for the pump that writes it; guarded by Session.mu.
	wantPing  bool
	wantClose bool
	closeCode uint16
	closeText string

	// How far the end has come; guarded by Session.mu.
	said   bool          // a close frame was written, or is being written
	saidAt time.Duration // when it had been written
	heard  bool          // a close frame was received, with code echo
	echo   uint16
	broken time.Duration // since when writes fail
	gone   bool          // nothing more is read from or written to it

	// Used by the clock alone; guarded by Session.mu.
	nextPing   time.Duration // 0: to be planned
	acked      uint64        // what the peer's kernel had acknowledged …
	progressed time.Duration // … and when that number last grew
}

// writable reports whether anything may still be written: the peer is there and
// was not told the end. Session.mu is held.
func (l *leg) writable() bool { return !l.said && !l.gone && l.broken == 0 }

// wake makes the pump that reads l, and writes the other leg, look for work.
func (l *leg) wake() { _ = l.conn.SetReadDeadline(past) }

// close ends the leg in good order.
func (l *leg) close() {
	l.in.Release()
	if l.gone || l.broken > 0 {
		l.cut()
		return
	}
	_ = l.conn.Close()
}

// cut closes the socket itself: closing TLS in good order may block.
func (l *leg) cut() {
	if t, ok := l.conn.(*tls.Conn); ok {
		_ = t.NetConn().Close()
		return
	}
	_ = l.conn.Close()
}

// ask returns what the kernel knows of the leg.
func (l *leg) ask() (sock.Info, bool) { return sock.Ask(l.conn) }
