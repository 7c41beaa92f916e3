// This file is the far end of a leg: a client or a backend that does what a test
// says, and notes every frame that arrives.

package session

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// manners are what a peer does by itself.
type manners struct {
	mute    bool          // answers no ping
	silent  bool          // answers no close frame and no FIN
	stalled bool          // does not read
	chunk   int           // reads that many bytes at most …
	every   time.Duration // … and then waits so long
	dies    func(p *peer) // what it does when …
	after   int           // … it has read so many bytes; not 0
}

// got is a frame that arrived.
type got struct {
	at      time.Time
	head    ws.Header
	payload []byte // unmasked
}

// peer is one far end. Two goroutines, read and write, belong to it; both end
// when its connection is closed.
type peer struct {
	conn   *memConn
	masked bool // it is a client

	// A backend's.
	upstream string
	told     Interruption
	attempt  int

	tasks sync.WaitGroup

	mu        sync.Mutex // guards what follows
	changed   sync.Cond
	is        manners
	queue     []func() error // what is to be done by write
	sent      []byte         // all that was queued to be written
	over      bool
	raw       []byte // all that was read
	parsed    int    // how much of raw is in frames
	frames    []got
	end       error // why reading ended
	sentClose bool
}

func newPeer(conn *memConn, client bool, is manners) *peer {
	p := &peer{conn: conn, masked: client, is: is}
	p.changed.L = &p.mu
	p.tasks.Go(p.read)
	p.tasks.Go(p.write)
	return p
}

// leave ends the peer's goroutines.
func (p *peer) leave() {
	p.mu.Lock()
	p.over = true
	p.changed.Broadcast()
	p.mu.Unlock()
	_ = p.conn.Close()
	p.tasks.Wait()
}

// read notes what arrives until the stream ends.
func (p *peer) read() {
	buf := make([]byte, 64<<10)
	for {
		is, over := p.mayRead()
		if over {
			return
		}
		chunk := buf
		if is.chunk > 0 {
			chunk = buf[:is.chunk]
		}
		if is.dies != nil {
			chunk = chunk[:max(0, min(len(chunk), is.after-len(p.raw)))]
		}
		n, err := p.conn.Read(chunk) // none of no bytes waits as well
		if n > 0 {
			p.note(chunk[:n])
		}
		if is.dies != nil && len(p.raw) >= is.after {
			is.dies(p)
			return
		}
		if err != nil && !p.resumes() {
			p.ended(err)
			return
		}
		if is.every > 0 {
			p.nap(is.every)
		}
	}
}

// nap waits unless the peer is to leave.
func (p *peer) nap(d time.Duration) {
	timer := time.AfterFunc(d, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.changed.Broadcast()
	})
	defer timer.Stop()
	until := time.Now().Add(d)
	p.mu.Lock()
	defer p.mu.Unlock()
	for time.Now().Before(until) && !p.over {
		p.changed.Wait()
	}
}

// mayRead waits while the peer is stalled.
func (p *peer) mayRead() (is manners, over bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.is.stalled && !p.over {
		p.changed.Wait()
	}
	return p.is, p.over
}

// resumes reports whether a Read failed only because stall interrupted it.
func (p *peer) resumes() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn.closed() || !p.conn.interrupted() {
		return false
	}
	for p.is.stalled && !p.over {
		p.changed.Wait()
	}
	_ = p.conn.SetReadDeadline(time.Time{})
	return true
}

func (c *memConn) interrupted() bool {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	return c.in.readBy.passed
}

// stall lets the peer read nothing more until resume.
func (p *peer) stall() {
	p.behave(func(is *manners) { is.stalled = true })
	_ = p.conn.SetReadDeadline(past)
}

func (p *peer) resume() { p.behave(func(is *manners) { is.stalled = false }) }

func (p *peer) behave(change func(is *manners)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.is)
	p.changed.Broadcast()
}

// note cuts what was read into frames and answers them, with a decoder of its own.
func (p *peer) note(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.raw = append(p.raw, b...)
	for {
		head, size, ok := parseHeader(p.raw[p.parsed:])
		start := p.parsed + size
		if !ok || int64(len(p.raw)-start) < head.Length {
			return
		}
		f := got{time.Now(), head, bytes.Clone(p.raw[start : start+int(head.Length)])}
		if head.Masked {
			ws.Cipher(f.payload, head.Mask, 0)
		}
		p.parsed = start + int(head.Length)
		p.frames = append(p.frames, f)
		switch {
		case head.OpCode == ws.OpPing && !p.is.mute:
			p.enqueue(p.frame(true, 0, ws.OpPong, f.payload))
		case head.OpCode == ws.OpClose && !p.is.silent:
			if !p.sentClose {
				p.sentClose = true
				p.enqueue(p.frame(true, 0, ws.OpClose, f.payload))
			}
			if !p.masked { // RFC 6455 §7.1.1: the server closes first
				p.queue = append(p.queue, p.conn.Close)
				p.changed.Broadcast()
			}
		}
	}
}

// parseHeader decodes the header at the front of wire, if all of it is there.
func parseHeader(wire []byte) (head ws.Header, size int, ok bool) {
	rest := bytes.NewReader(wire)
	head, err := ws.ReadHeader(rest)
	return head, len(wire) - rest.Len(), err == nil
}

// ended notes the end of the stream and, as all but silent peers do, closes.
func (p *peer) ended(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end = err
	if !p.is.silent {
		p.queue = append(p.queue, p.conn.Close)
		p.changed.Broadcast()
	}
}

// received returns what has arrived so far.
func (p *peer) received() []got {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clip(p.frames)
}

// wire returns the bytes that have arrived so far.
func (p *peer) wire() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return bytes.Clone(p.raw)
}

// ending returns why reading ended; nil if it has not.
func (p *peer) ending() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.end
}

// farewell describes the close frames that arrived: "1001 idle", "-" for none.
// It is an error if anything came after the first, or in part.
func (p *peer) farewell(t *testing.T) string {
	t.Helper()
	said := "-"
	for _, f := range p.received() {
		switch {
		case said != "-":
			t.Errorf("got %v after the close frame, want nothing", f.head)
		case f.head.OpCode == ws.OpClose:
			said = describeClose(f.payload)
		}
	}
	if p.mu.Lock(); said != "-" && p.parsed < len(p.raw) {
		t.Errorf("got %d bytes after the close frame, want nothing", len(p.raw)-p.parsed)
	}
	p.mu.Unlock()
	return said
}

func describeClose(payload []byte) string {
	if len(payload) < 2 {
		return "empty"
	}
	s := fmt.Sprint(binary.BigEndian.Uint16(payload))
	if len(payload) > 2 {
		s += " " + string(payload[2:])
	}
	return s
}

// pings returns when pings arrived.
func (p *peer) pings() (at []time.Time) {
	for _, f := range p.received() {
		if f.head.OpCode == ws.OpPing {
			at = append(at, f.at)
		}
	}
	return at
}

// messages returns the complete messages that arrived, and how many frames they took.
func (p *peer) messages() (all []string, frames int) {
	var open []byte
	for _, f := range p.received() {
		if f.head.OpCode.IsControl() {
			continue
		}
		frames++
		open = append(open, f.payload...)
		if f.head.Fin {
			all, open = append(all, string(open)), nil
		}
	}
	return all, frames
}
