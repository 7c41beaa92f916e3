// This file is an in-memory connection that behaves like TCP where a tunnel can
// tell: a bounded buffer each way, read deadlines, half-close and reset.

package tunnel

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// memConn is one end of a connection. Its net.Conn is nil: what a tunnel does not
// use is not there.
type memConn struct {
	net.Conn
	in, out *stream
	abrupt  atomic.Bool // Close is a reset
}

// stream is one direction. mu is never held while somebody waits.
type stream struct {
	mu      sync.Mutex
	changed sync.Cond
	limit   int
	data    []byte
	waiting int  // bytes of a Write that wait for room
	fin     bool // the writer has ended
	left    bool // the reader is gone
	reset   bool // broken, after what is in data
	late    bool // the deadline of reads has passed
}

// newMemPipe returns the two ends of a connection with room for limit bytes each way.
func newMemPipe(limit int) (a, b *memConn) {
	ab, ba := &stream{limit: limit}, &stream{limit: limit}
	ab.changed.L, ba.changed.L = &ab.mu, &ba.mu
	return &memConn{in: ba, out: ab}, &memConn{in: ab, out: ba}
}

func (c *memConn) Read(p []byte) (int, error) {
	s := c.in
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.left:
			return 0, net.ErrClosed
		case s.late:
			return 0, os.ErrDeadlineExceeded
		case len(s.data) > 0:
			n := copy(p, s.data)
			s.data = s.data[n:]
			s.changed.Broadcast()
			return n, nil
		case s.reset:
			return 0, syscall.ECONNRESET
		case s.fin:
			return 0, io.EOF
		}
		s.changed.Wait()
	}
}

func (c *memConn) Write(p []byte) (n int, err error) {
	s := c.out
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.fin:
			return n, net.ErrClosed
		case s.reset || s.left:
			return n, syscall.ECONNRESET
		}
		m := min(len(p)-n, s.limit-len(s.data))
		s.data = append(s.data, p[n:n+m]...)
		n += m
		if m > 0 {
			s.changed.Broadcast()
		}
		if n == len(p) {
			return n, nil
		}
		s.waiting = len(p) - n
		s.changed.Wait()
		s.waiting = 0
	}
}

// CloseWrite sends a FIN after what was written.
func (c *memConn) CloseWrite() error {
	c.out.update(func() { c.out.fin = true })
	return nil
}

// SetLinger makes Close a reset.
func (c *memConn) SetLinger(int) error {
	c.abrupt.Store(true)
	return nil
}

func (c *memConn) Close() error {
	c.in.update(func() { c.in.left = true })
	if c.abrupt.Load() {
		c.out.update(func() { c.out.reset, c.out.data = true, nil })
	}
	return c.CloseWrite()
}

// Reset breaks the connection; what was written before arrives.
func (c *memConn) Reset() {
	c.in.update(func() { c.in.reset = true })
	c.out.update(func() { c.out.reset = true })
}

func (c *memConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetReadDeadline knows no deadline but none and one that wakes at once.
func (c *memConn) SetReadDeadline(t time.Time) error {
	if t.IsZero() || t.Equal(past) {
		c.in.update(func() { c.in.late = !t.IsZero() })
	}
	return nil
}

// SockInfo tells what sock.Ask tells of a socket.
func (c *memConn) SockInfo() (info sock.Info, ok bool) {
	c.in.mu.Lock()
	info.Reset, info.Finished, info.Unread = c.in.reset, c.in.fin || c.in.reset, len(c.in.data)
	c.in.mu.Unlock()
	c.out.mu.Lock()
	info.Unacked = len(c.out.data) + c.out.waiting
	c.out.mu.Unlock()
	return info, true
}

func (s *stream) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	s.changed.Broadcast()
}

var _ sock.Asker = (*memConn)(nil)
