// This file is an in-memory connection that behaves like TCP where a session can
// tell: a bounded buffer each way, deadlines, half-close and reset.

package session

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// defaultBuffer is how many bytes a memConn takes that its peer has not read.
const defaultBuffer = 64 << 10

// memConn is one end of a connection.
type memConn struct {
	in, out *stream
}

// newMemPipe returns the two ends of a connection with buffer bytes each way.
func newMemPipe(buffer int) (a, b *memConn) {
	ab, ba := newStream(buffer), newStream(buffer)
	return &memConn{in: ba, out: ab}, &memConn{in: ab, out: ba}
}

// stream is one direction of a connection. mu is never held while somebody
// waits: Cond.Wait gives it up, and counts as durably blocked in a bubble.
type stream struct {
	mu      sync.Mutex
	changed sync.Cond
	limit   int
	ring    []byte // grows up to limit
	first   int    // index of the oldest byte
	n       int    // bytes in ring
	fin     bool
	left    bool // the reader has closed: nobody takes what is written
	refused bool // … and has said so, with a reset
	aborted bool // the writer has reset the connection after what it had written
	reset   bool
	readBy  deadline
	writeBy deadline

	written uint64  // bytes ever taken
	waiting int     // bytes of Writes that wait for room
	under   int     // bytes that are always on their way, for SockInfo
	log     *[]byte // all bytes that Writes got rid of, if not nil
}

func newStream(buffer int) *stream {
	s := &stream{limit: buffer}
	s.changed.L = &s.mu
	return s
}

// Read returns what has arrived, as much as fits. A deadline that has passed
// comes before the bytes, which stay for the next Read.
func (c *memConn) Read(p []byte) (int, error) {
	s := c.in
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.left:
			return 0, net.ErrClosed
		case s.readBy.passed:
			return 0, os.ErrDeadlineExceeded
		case s.reset:
			return 0, syscall.ECONNRESET
		case s.n > 0:
			return s.take(p), nil
		case s.aborted:
			return 0, syscall.ECONNRESET
		case s.fin:
			return 0, io.EOF
		}
		s.changed.Wait()
	}
}

// Write blocks until the buffer has taken all of p. The first one after the peer
// has closed goes out, and is answered with a reset.
func (c *memConn) Write(p []byte) (n int, err error) {
	s := c.out
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.fin:
			return n, net.ErrClosed
		case s.writeBy.passed:
			return n, os.ErrDeadlineExceeded
		case s.reset:
			return n, syscall.ECONNRESET
		case s.left && (s.refused || n > 0):
			return n, syscall.EPIPE
		case s.left:
			s.refused = true
			s.note(p)
			return len(p), nil
		}
		n += s.put(p[n:])
		if n == len(p) {
			return n, nil
		}
		s.waiting += len(p) - n
		s.changed.Wait()
		s.waiting -= len(p) - n
	}
}

// Close ends both directions. What was written before is still delivered. If
// there is something that was not read, the peer finds a reset after that, and no
// end (RFC 1122 §4.2.2.13), as from Linux.
func (c *memConn) Close() error {
	unread := false
	c.in.update(func() {
		unread = !c.in.left && c.in.n > 0
		c.in.left = true
		c.in.refused = c.in.refused || unread
	})
	c.out.update(func() { c.out.aborted = c.out.aborted || unread && !c.out.fin })
	return c.CloseWrite()
}

// SockInfo tells what sock.Ask tells of a socket.
func (c *memConn) SockInfo() (info sock.Info, ok bool) {
	c.in.mu.Lock()
	info.Reset = c.in.reset || c.in.aborted
	info.Finished = info.Reset || c.in.fin
	info.Unread = c.in.n
	c.in.mu.Unlock()
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	info.Reset = info.Reset || c.out.refused
	info.Unacked, info.Unsent = c.out.waiting+c.out.under, c.out.waiting
	info.Acked = c.out.written
	return info, true
}

// blind is a connection of which nothing is known, like a stream of HTTP/2.
type blind struct{ Conn }

// lateEnd is a connection whose reader is slow to find that it has ended, as if the
// scheduler had let others go first.
type lateEnd struct{ *memConn }

func (c lateEnd) Read(p []byte) (int, error) {
	n, err := c.memConn.Read(p)
	if err == io.EOF {
		time.Sleep(time.Millisecond)
	}
	return n, err
}

// CloseWrite sends a FIN after what was written.
func (c *memConn) CloseWrite() error {
	c.out.update(func() { c.out.fin = true })
	return nil
}

// CloseRead refuses what comes from now on; the other direction stays.
func (c *memConn) CloseRead() { c.in.update(func() { c.in.left, c.in.refused = true, true }) }

// Reset breaks the connection for both ends. What was not read is lost.
func (c *memConn) Reset() {
	for _, s := range []*stream{c.in, c.out} {
		s.update(func() { s.reset, s.n = true, 0 })
	}
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readBy, t)
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.out.setDeadline(&c.out.writeBy, t)
	return nil
}

// closed reports whether this end was closed.
func (c *memConn) closed() bool {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	return c.in.left
}

// room returns how many bytes a Write would take at once.
func (c *memConn) room() int {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.out.limit - c.out.n
}

// take moves bytes from the ring to p. mu is held.
func (s *stream) take(p []byte) (n int) {
	for n < len(p) && s.n > 0 {
		run := min(s.n, len(s.ring)-s.first)
		m := copy(p[n:], s.ring[s.first:s.first+run])
		s.first = (s.first + m) % len(s.ring)
		s.n -= m
		n += m
	}
	if n > 0 {
		s.changed.Broadcast()
	}
	return n
}

// put moves bytes from p to the ring. mu is held.
func (s *stream) put(p []byte) (n int) {
	if need := min(s.n+len(p), s.limit); need > len(s.ring) {
		grown := make([]byte, min(max(need, 2*len(s.ring)), s.limit))
		s.n = s.take(grown)
		s.ring, s.first = grown, 0
	}
	for n < len(p) && s.n < len(s.ring) {
		end := (s.first + s.n) % len(s.ring)
		run := min(len(s.ring)-s.n, len(s.ring)-end)
		m := copy(s.ring[end:end+run], p[n:])
		s.n += m
		n += m
	}
	if n > 0 {
		s.written += uint64(n)
		s.note(p[:n])
		s.changed.Broadcast()
	}
	return n
}

// note keeps what a Write has got rid of. mu is held.
func (s *stream) note(p []byte) {
	if s.log != nil {
		*s.log = append(*s.log, p...)
	}
}

func (s *stream) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	s.changed.Broadcast()
}

// deadline is guarded by the mutex of its stream.
type deadline struct {
	timer  *time.Timer
	passed bool
}

func (s *stream) setDeadline(d *deadline, t time.Time) {
	s.update(func() {
		if d.timer != nil {
			d.timer.Stop()
			d.timer = nil
		}
		wait := time.Until(t)
		d.passed = !t.IsZero() && wait <= 0
		if t.IsZero() || d.passed {
			return
		}
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			s.update(func() { d.passed = d.passed || d.timer == timer })
		})
		d.timer = timer
	})
}

var (
	_ Conn       = (*memConn)(nil)
	_ sock.Asker = (*memConn)(nil)
)
