// This file holds the two connections of a tunnel and what may be done to them.

package tunnel

import (
	"io"
	"net"
	"syscall"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// leg is one peer's connection.
type leg struct {
	conn net.Conn
	// raw is the socket, if conn is one and nothing lies in between: only then do
	// bytes that come past conn's own methods keep their meaning.
	raw syscall.RawConn

	// Guarded by Tunnel.mu:
	finished bool          // it has sent all that it ever will
	gone     bool          // it is broken, or given up: nothing more is expected of it
	broken   time.Duration // since when it is known to be broken, but not why
	toldAt   time.Duration // when it was told the end
}

func (l *leg) init(conn net.Conn) {
	l.conn = conn
	_ = conn.SetDeadline(time.Time{})
	switch c := conn.(type) { // not whatever embeds one of these
	case *net.TCPConn:
		l.raw, _ = c.SyscallConn()
	case *net.UnixConn:
		l.raw, _ = c.SyscallConn()
	}
}

// ask returns what the kernel knows of the leg.
func (l *leg) ask() (sock.Info, bool) { return sock.Ask(l.conn) }

// closeWrite tells the peer the end, through wrappers that do not forward that. It
// returns false if there is no way to do so and keep the other direction.
func (l *leg) closeWrite() bool {
	for c := any(l.conn); c != nil; c = sock.Inner(c) {
		if w, ok := c.(interface{ CloseWrite() error }); ok {
			_ = w.CloseWrite() // it fails if the peer is gone; who reads there knows
			return true
		}
	}
	return false
}

// cut closes the leg's socket, which ends all reads and writes; by a reset, in a way
// that its peer does not take for an end. A Unix socket can only be closed. What is
// above the socket is not touched: closing it might write, TLS for one, and caddy-l4
// does not expect that any more once Run has returned.
func (l *leg) cut(reset bool) {
	socket := any(l.conn)
	for c := socket; c != nil; c = sock.Inner(c) {
		socket = c
	}
	if s, ok := socket.(interface{ SetLinger(sec int) error }); ok && reset {
		_ = s.SetLinger(0)
	}
	_ = socket.(io.Closer).Close()
}
