// This file holds the uplink: what the client sends goes to the backend that is
// there, and is kept for the next one as far as the route says.

package session

import (
	"io"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// uplink is the only reader of the client and the only writer of the backends. It
// runs until the client has nothing more to say.
func (s *Session) uplink() {
	c := &s.client
	garbled := false // the bytes of the client are no frames any more
	for {
		s.attend()
		if garbled {
			c.in.Release()
		} else if err := s.forwardUp(); err != nil {
			garbled = true
			if err != errHeardClose {
				s.rec.Close(registry.Ending{Reason: registry.ClientProtocol})
			}
		}
		if s.finishedWith(c) {
			break
		}
		if err := s.fill(c); err != nil {
			if err == io.EOF {
				s.deliver() // what it wrote before it left
			}
			s.leave(c, err)
		}
	}
	s.attend()
	s.tellLast(c, s.backend())
	c.in.Release()
}

// attend does what was left for the uplink: it settles accounts with a backend
// that is lost, writes what was kept to one that took over, and pings and close
// frames.
func (s *Session) attend() {
	for s.upWork.Swap(false) {
		b := s.backend()
		s.settle(b)
		s.drain(b)
		s.serve(b)
		s.report(b)
	}
}

// upstroke is what the uplink forwards at once.
type upstroke struct {
	batch
	to   *leg // the backend that was there when it began; nil: there was none
	kept bool // the queue has it; else it is written now or never
	late bool // the session ends: the queue knows nothing of it
}

// forwardUp takes all units that the client has sent.
func (s *Session) forwardUp() error {
	var b upstroke
	for {
		u, err := s.client.in.Next()
		if err != nil || u == nil {
			s.flushUp(&b)
			return err
		}
		switch {
		case u.Data():
			s.take(&b, u)
		case u.Op == ws.OpClose:
			s.flushUp(&b)
			s.deliver()
			s.closeFrom(&s.client, s.backend(), u)
			return errHeardClose
		default:
			s.flushUp(&b)
			s.controlUp(u)
		}
	}
}

// take adds a unit of a message to what is forwarded. While there is no room for
// it, it waits.
func (s *Session) take(b *upstroke, u *frame.Unit) {
	for {
		s.mu.Lock()
		to := s.receiver(b)
		late := s.closing
		fate := s.keep(u, to != nil)
		overflow := fate == replay.Full && to == nil && s.overflows()
		s.mu.Unlock()
		switch {
		case fate == replay.Dropped:
			s.flushUp(b)
			return
		case fate != replay.Full:
			kept := fate == replay.Kept
			if len(b.wire) > 0 && (b.kept != kept || b.late != late || b.to != to) || !b.add(u) {
				s.flushUp(b)
				b.add(u)
			}
			b.to, b.kept, b.late = to, kept, late
			return
		case len(b.wire) > 0:
			s.flushUp(b) // it may count as something that could be let go
		case overflow:
			s.rec.Close(registry.Ending{Reason: registry.Overflow})
			s.End(s.rec.Ending())
		default:
			s.await(func() bool { return false })
			s.attend()
		}
	}
}

// receiver returns the backend that may be written right after b, or nil: there
// is none, it is being left, or the queue comes first. Session.mu is held.
func (s *Session) receiver(b *upstroke) *leg {
	to := s.backend()
	if len(b.wire) > 0 && b.to != to {
		return nil
	}
	if !to.writable() || to.lost || len(b.wire) == 0 && s.queue.Backlog() {
		return nil
	}
	if s.search.halt && len(b.wire) == 0 && s.queue.Boundary() {
		return nil
	}
	return to
}

// keep asks the queue to keep a unit. Once the session ends nothing is kept.
// Session.mu is held.
func (s *Session) keep(u *frame.Unit, live bool) replay.Fate {
	if s.closing {
		if live {
			return replay.Passed
		}
		return replay.Dropped
	}
	set := s.route.Settings()
	fate := s.queue.Append(u.Wire, u.First, u.Last, live, set.mode(), set.ReplayBuffer)
	switch fate {
	case replay.Passed:
		s.queue.Sent(len(u.Wire)) // as good as: nobody could write it again
	case replay.Kept:
		s.rec.SetBuffered(s.queue.Buffered())
	default: // nothing was taken
	}
	return fate
}

// overflows reports whether a client whose messages do not fit any more is ended
// rather than paused. Session.mu is held.
func (s *Session) overflows() bool {
	set := s.route.Settings()
	return set.ReplayClose && set.mode() != replay.Off && s.heldAt != 0
}

// flushUp counts the batch and writes it, if it is its turn; else the queue has
// it, or it is lost with the backend it was for.
func (s *Session) flushUp(b *upstroke) {
	if len(b.wire) == 0 {
		return
	}
	// Counted first, so that who sees a message finds it counted.
	s.rec.Count(registry.In, b.data, b.messages)
	s.client.unpassed.Store(int64(s.client.in.Buffered()))
	s.mu.Lock()
	to := b.to
	if to != nil && (to.lost || !to.writable()) {
		to = nil
	}
	ping := false
	if to == nil && !b.kept && !b.late {
		s.queue.Unsent(len(b.wire)) // for the verdict
	}
	if to != nil {
		if b.kept {
			s.queue.Sent(len(b.wire))
		}
		to.writing.Store(int64(s.now())) // with what it is marked as sent for
		ping = s.asks(to)
	}
	s.mu.Unlock()
	if to != nil {
		s.writeUp(to, b.wire, !b.late, ping)
	} else if b.kept {
		s.upWork.Store(true) // another backend may be there already
	}
	*b = upstroke{}
	s.report(s.backend())
	s.attend()
}

// writeUp writes messages to a backend, and after them a ping that asks whether
// they were read. known says that the queue knows of them.
func (s *Session) writeUp(to *leg, wire []byte, known, ping bool) {
	n, ok := s.write(to, wire)
	mode := s.route.Settings().mode()
	if known && (!ok || mode != replay.Unacked) {
		s.mu.Lock()
		if !ok {
			s.queue.Unsent(len(wire) - n)
		}
		s.queue.Release(mode)
		s.rec.SetBuffered(s.queue.Buffered())
		s.mu.Unlock()
	}
	if ok && ping {
		s.ping(to)
	}
}

// drain writes what was kept to a backend that may have it.
func (s *Session) drain(b *leg) {
	for {
		s.mu.Lock()
		var wire []byte
		if b == s.backend() && b.writable() && !b.lost {
			wire = s.queue.Pending(s.search.halt)
		}
		if wire == nil {
			s.mu.Unlock()
			return
		}
		s.queue.Sent(len(wire))
		b.writing.Store(int64(s.now()))
		ping := s.asks(b)
		s.mu.Unlock()
		s.writeUp(b, wire, true, ping)
		if s.upWork.Load() {
			return // other work comes between two writes
		}
	}
}

// controlUp handles a ping or a pong of the client. Without a backend the
// session answers pings itself; pongs were for a backend that is gone.
func (s *Session) controlUp(u *frame.Unit) {
	payload := u.Unmasked()
	if u.Op == ws.OpPong && s.own.has(payload) {
		return
	}
	s.mu.Lock()
	b := s.backend()
	pass := b.writable() && !b.lost
	if u.Op == ws.OpPing {
		pass = pass && s.pings.Sent(payload, false, s.queue.Mark())
		if !pass && !s.closing {
			s.answer(payload)
		}
	}
	s.mu.Unlock()
	if pass {
		s.write(b, u.Wire)
	}
}

// deliver waits, when the client has said its last word, until a backend has got
// all of its messages, or there is nothing to deliver, or the session ends.
func (s *Session) deliver() {
	done := func() bool {
		b := s.backend()
		return s.queue.Empty() || b.writable() && !b.lost && !s.queue.Backlog() && !s.search.halt
	}
	for {
		s.mu.Lock()
		over := s.closing || done()
		s.mu.Unlock()
		if over {
			return
		}
		s.await(done)
		s.attend()
	}
}

// await makes the uplink wait until there is work, the session ends, or ready
// says so, which is called with Session.mu held. Meanwhile nobody reads the client.
func (s *Session) await(ready func() bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = true
	s.client.reading.Store(0)
	s.client.waiting.Store(int64(s.now()))
	s.lookSoon(activePeriod)
	for !s.upWork.Load() && !s.closing && !ready() {
		s.changed.Wait()
	}
	s.client.waiting.Store(0)
	s.paused = false
}
