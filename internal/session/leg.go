package session

import (
	"crypto/tls"
	"sync/atomic"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// The two sides of a session.
const (
	clientSide = iota
	backendSide
)

// past is a deadline that wakes a Read at once.
var past = time.Unix(1, 0)

// leg is one peer's connection. Times are on the session's clock; 0 is never. The
// fields are in this order, flags together, because legs are most of what an idle
// session costs.
type leg struct {
	conn     Conn
	upstream *registry.Upstream // a backend's
	in       frame.Reader       // used by the pump that reads the leg

	// Written by the pumps, read by the clock.
	reading   atomic.Int64 // since when the leg is being read without a break
	waiting   atomic.Int64 // since when its reader waits for something else
	lastRead  atomic.Int64 // when the last byte came
	writing   atomic.Int64 // when the Write in progress began
	slow      atomic.Int64 // when the last Write ended that had to wait for the peer
	unpassed  atomic.Int64 // bytes read, and not yet part of the Write in progress
	pingBegan atomic.Int64 // when writing the oldest unanswered ping began …
	pingDone  atomic.Int64 // … and when it had been written

	side uint8

	// All that follows is guarded by Session.mu. Left with the leg for the pump that
	// writes it:
	wantPing  bool
	wantClose bool
	closeCode uint16
	closeText string

	// How far the end has come.
	said   bool          // a close frame was written, or is being written
	heard  bool          // a close frame was received, with code echo
	gone   bool          // nothing more is read from or written to it
	early  bool          // its FIN was there before our close frame was written
	ended  bool          // its stream has ended, and its connection had not
	tooBig bool          // a backend sent a message that is too big
	echo   uint16        //
	saidAt time.Duration // when our close frame had been written
	broken time.Duration // since when writes fail

	// How a backend was lost.
	lost    bool
	settled bool          // accounts are settled: another leg may take over
	doomed  bool          // … or they end the session
	proven  bool          // it has read everything that was written
	blamed  bool          // it counted as a failure of its upstream, or was asked to go
	cause   uint16        // the close code it gave, or was given
	parting time.Duration // since when it is being left in good order

	// What acknowledges messages.
	pinged     time.Duration // when the first ping of the session's own was sent
	lastPing   time.Duration // … and the last one …
	pingMark   uint64        // … with what it acknowledges
	drained    time.Duration // when its kernel was seen to have acknowledged …
	drainMark  uint64        // … everything up to here
	nextPing   time.Duration // when a heartbeat is due; 0: to be planned
	began      time.Duration // when the leg took over
	acked      uint64        // what the peer's kernel had acknowledged …
	progressed time.Duration // … and when that number last grew …
	taking     time.Duration // … with more waiting: somebody reads there
}

func (l *leg) init(side uint8, peer Peer, compressed bool) {
	l.side, l.conn = side, peer.Conn
	l.in.Init(side == clientSide, compressed)
	l.in.Preload(peer.Early)
}

// writable reports whether anything may still be written: the peer is there and
// was not told the end. Session.mu is held.
func (l *leg) writable() bool { return !l.said && !l.gone && l.broken == 0 }

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

// held returns how many bytes were read from the leg's socket and wait to be taken. Only
// the pump that reads the leg may call it.
func (l *leg) held() int { return l.in.Buffered() + sock.Held(l.conn) }

// ask returns what the kernel knows of the leg.
func (l *leg) ask() (sock.Info, bool) { return sock.Ask(l.conn) }
