// This file holds the carrier that copies: for everything that the kernel
// cannot splice.

package tunnel

import (
	"io"
	"sync"
)

const (
	copySize  = 32 << 10
	firstSize = 512
)

var buffers = sync.Pool{New: func() any { return new([copySize]byte) }}

// copier reads into a buffer out of a pool. From a socket it does so when there is
// something to read. From anything else, which may hold back bytes of its own, it
// waits with a small buffer, and goes on with a large one while those fill up.
type copier struct {
	p    *pump
	buf  *[copySize]byte // nil while there is nothing to carry
	held []byte          // what was read, in buf or in first

	first []byte // nil for sockets
	more  bool   // the last read has filled its buffer

	// For sockets; bound once, because a method value is an allocation.
	pull  func(fd uintptr) bool
	limit int
	err   error
}

func newCopier(p *pump) *copier {
	c := &copier{p: p}
	if p.from.raw != nil && readsRaw {
		c.pull = c.readSocket
	} else {
		c.first = make([]byte, firstSize)
	}
	return c
}

func (c *copier) fill(limit int) (n int, err error) {
	c.held = nil
	if c.pull != nil {
		c.limit, c.err = limit, nil
		if err = c.p.from.raw.Read(c.pull); err == nil {
			err = c.err
		}
	} else {
		err = c.readConn(limit)
	}
	return len(c.held), err
}

func (c *copier) drain() error {
	err := c.p.write(c.held)
	c.drop()
	return err
}

func (c *copier) drop() {
	c.held = nil
	if c.buf != nil {
		buffers.Put(c.buf)
		c.buf = nil
	}
}

func (c *copier) close() { c.drop() }

// readSocket reads what the socket has. It returns false if that is nothing: the
// caller waits, and calls it again.
func (c *copier) readSocket(fd uintptr) bool {
	c.take()
	n, again, err := readRaw(fd, c.buf[:min(c.limit, copySize)])
	switch {
	case again:
		c.drop()
		return false
	case err != nil:
		c.err = err
	case n == 0:
		c.err = io.EOF
	default:
		c.held = c.buf[:n]
		return true
	}
	c.drop()
	return true
}

// readConn waits in a Read.
func (c *copier) readConn(limit int) error {
	b := c.first
	if c.more {
		c.take()
		b = c.buf[:]
	}
	b = b[:min(limit, len(b))]
	n, err := c.p.from.conn.Read(b)
	c.more = n == len(b)
	if c.held = b[:n]; n == 0 {
		c.drop()
	}
	return err
}

func (c *copier) take() {
	if c.buf == nil {
		c.buf = buffers.Get().(*[copySize]byte)
	}
}

var _ carrier = (*copier)(nil)
