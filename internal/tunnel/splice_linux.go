// This file holds the carrier that leaves the bytes in the kernel, if they are many.

package tunnel

import (
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// fewBytes is how many bytes that come at once are too many to be copied. Copying takes
// no descriptors; at 64 bytes it costs about a twentieth less CPU time than two splices,
// from 4 KiB on no difference was seen.
const fewBytes = 4 << 10

var smallBuffers = sync.Pool{New: func() any { return new([fewBytes]byte) }}

// spliced moves bytes between two TCP sockets: through a pipe while they come in large
// amounts, else through a buffer. The runtime's poller is edge-triggered: it may be
// waited for only after a read or a splice has said EAGAIN. That also means "the
// pipe is full", so the pipe is emptied before it is filled again.
type spliced struct {
	p    *pump
	many bool            // came the last time: a pipe is worth it
	pipe pipe            // while there is something to carry in it …
	buf  *[fewBytes]byte // … or in this
	done int             // bytes of buf that were written
	n    int             // bytes to carry

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
	s.giveBuffer()
	s.pipe, s.n = pipe{}, 0
}

func (s *spliced) giveBuffer() {
	if s.buf != nil {
		smallBuffers.Put(s.buf)
		s.buf = nil
	}
}

func (s *spliced) close() {
	s.drop()
	pipes.leave()
}

// fromSocket takes what the socket has. It returns false if that is nothing: the
// caller waits, and calls it again.
func (s *spliced) fromSocket(fd uintptr) bool {
	var again bool
	var err error
	if s.many {
		again, err = s.fillPipe(int(fd))
	} else {
		again, err = s.fillBuffer(fd)
	}
	switch {
	case again:
		s.drop()
		return false
	case err != nil:
		s.err = err
	case s.n == 0:
		s.err = io.EOF
	}
	s.many = s.n >= fewBytes
	return true
}

func (s *spliced) fillBuffer(fd uintptr) (again bool, err error) {
	if s.buf == nil {
		s.buf = smallBuffers.Get().(*[fewBytes]byte)
	}
	s.done = 0
	s.n, again, err = readRaw(fd, s.buf[:min(s.limit, fewBytes)])
	return again, err
}

func (s *spliced) fillPipe(fd int) (again bool, err error) {
	s.giveBuffer()
	if !s.pipe.open() {
		var ok bool
		if s.pipe, ok = pipes.get(); !ok {
			return false, errOtherCarrier
		}
	}
	switch s.n, err = splice(fd, s.pipe.w, min(s.limit, pipeSize)); err {
	case unix.EAGAIN:
		return true, nil
	case unix.EINVAL, unix.ENOSYS:
		return false, errOtherCarrier
	default:
		return false, err
	}
}

// toSocket gives the other socket what there is. It returns false if that has no
// room: the caller waits, and calls it again.
func (s *spliced) toSocket(fd uintptr) bool {
	for s.n > 0 {
		n, err := s.put(int(fd))
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

// put writes what it can of what there is: in the buffer, if there is one.
func (s *spliced) put(fd int) (n int, err error) {
	if s.buf == nil {
		return splice(s.pipe.r, fd, s.n)
	}
	for {
		n, err = unix.Write(fd, s.buf[s.done:s.done+s.n])
		if err != unix.EINTR {
			n = max(n, 0)
			s.done += n
			return n, err
		}
	}
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
