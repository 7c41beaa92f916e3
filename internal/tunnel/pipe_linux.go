// This file holds the pipes of spliced tunnels.

package tunnel

import (
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is what a splice moves at most. Less costs up to a fifth more time
	// per byte; what a peer that does not read pins this way is little beside the
	// buffers of its two sockets.
	pipeSize = 1 << 20

	// sparePipes is how many pipes are kept for later. More are in use only while
	// as many pumps move bytes, or wait for room, at the same moment.
	sparePipes = 32
)

// pipes are those of the whole process. Pumps take one for as long as they have
// bytes in hand.
var pipes pipePool

// pipe is a pair of descriptors; the zero value is none.
type pipe struct{ r, w int }

func (p pipe) open() bool { return p.w != 0 }

func (p pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// pipePool keeps spare pipes while there are pumps that may need them.
type pipePool struct {
	mu    sync.Mutex
	users int
	made  int // that exist, for tests
	spare []pipe
}

// join begins what leave ends: the pool is used.
func (p *pipePool) join() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.users++
}

// leave closes all spare pipes after the last user.
func (p *pipePool) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.users--
	if p.users > 0 {
		return
	}
	for _, s := range p.spare {
		s.close()
	}
	p.made -= len(p.spare)
	p.spare = nil
}

// get returns an empty pipe, or false if the system gives none.
func (p *pipePool) get() (pipe, bool) {
	p.mu.Lock()
	if n := len(p.spare); n > 0 {
		s := p.spare[n-1]
		p.spare = p.spare[:n-1]
		p.mu.Unlock()
		return s, true
	}
	p.made++
	p.mu.Unlock()
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		p.mu.Lock()
		p.made--
		p.mu.Unlock()
		return pipe{}, false
	}
	// Users other than root may have 64 MiB in pipes; those that are made above that
	// keep the 64 KiB that they begin with.
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize)
	return pipe{fds[0], fds[1]}, true
}

// put gives a pipe back. One that is not empty would give its bytes to somebody
// else, and is closed.
func (p *pipePool) put(s pipe, empty bool) {
	p.mu.Lock()
	if empty && len(p.spare) < sparePipes {
		p.spare = append(p.spare, s)
		p.mu.Unlock()
		return
	}
	p.made--
	p.mu.Unlock()
	s.close()
}
