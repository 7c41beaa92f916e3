// This file holds the carrier that leaves the bytes in the kernel.

package tunnel

import (
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// spliced moves bytes between two TCP sockets through a pipe. The runtime's poller
// is edge-triggered: it may be waited for only after a splice has said EAGAIN.
// That also means "the pipe is full", so the pipe is emptied before it is filled
// again.
type spliced struct {
	p    *pump
	pipe pipe // while there is something to carry
	n    int  // bytes in the pipe

	// Bound once, because a method value is an allocation.
	pull, push func(fd uintptr) bool
	limit      int
	err        error
}

// newCarrier returns what carries the pump's bytes best.
func newCarrier(p *pump) carrier {
	_, from := p.from.conn.(*net.TCPConn)
	_, to := p.to.conn.(*net.TCPConn)
	if !from || !to || p.from.raw == nil || p.to.raw == nil {
		return newCopier(p)
	}
	s := &spliced{p: p}
	s.pull, s.push = s.fromSocket, s.toSocket
	pipes.join()
	return s
}

func (s *spliced) fill(limit int) (int, error) {
	s.limit, s.err = limit, nil
	err := s.p.from.raw.Read(s.pull)
	if err == nil {
		err = s.err
	}
	if s.n == 0 {
		s.drop()
	}
	return s.n, err
}

func (s *spliced) drain() error {
	s.err = nil
	err := s.p.to.raw.Write(s.push)
	if err == nil {
		err = s.err
	}
	if err != nil {
		s.drop()
	}
	return err
}

func (s *spliced) drop() {
	if s.pipe.open() {
		pipes.put(s.pipe, s.n == 0)
	}
	s.pipe, s.n = pipe{}, 0
}

func (s *spliced) close() {
	s.drop()
	pipes.leave()
}

// fromSocket fills the pipe. It returns false if the socket has nothing: the
// caller waits, and calls it again.
func (s *spliced) fromSocket(fd uintptr) bool {
	if !s.pipe.open() {
		var ok bool
		if s.pipe, ok = pipes.get(); !ok {
			s.err = errOtherCarrier
			return true
		}
	}
	n, err := splice(int(fd), s.pipe.w, min(s.limit, pipeSize))
	switch {
	case err == unix.EAGAIN:
		s.drop()
		return false
	case err == unix.EINVAL || err == unix.ENOSYS:
		s.err = errOtherCarrier
	case err != nil:
		s.err = err
	case n == 0:
		s.err = io.EOF
	}
	s.n = n
	return true
}

// toSocket empties the pipe. It returns false if the socket has no room.
func (s *spliced) toSocket(fd uintptr) bool {
	for s.n > 0 {
		n, err := splice(s.pipe.r, int(fd), s.n)
		if err == unix.EAGAIN {
			s.p.waits()
			return false
		}
		if err == nil && n == 0 {
			err = io.ErrShortWrite // a pipe that has fewer bytes than it was given
		}
		if err != nil {
			s.err = err
			break
		}
		s.n -= n
	}
	if s.p.waiting.Load() != 0 {
		s.p.goesOn()
	}
	return true
}

func splice(from, to, n int) (int, error) {
	for {
		m, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return int(max(m, 0)), err
		}
	}
}

var _ carrier = (*spliced)(nil)
