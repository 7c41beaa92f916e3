// This file holds the uplink: what the client sends goes to the backend that is
// there, and is kept for the next one as far as the route says.

package session

import (
	"errors"
	"io"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// uplink is the only reader of the client and the only writer of the backends. It
// runs until the client has nothing more to say. It calls what blocks by itself,
// and not from deep below, which would cost every connection a larger stack.
func (s *Session) uplink() {
	for over := false; !over; {
		s.attend()
		switch s.collect() {
		case flush:
			s.flushUp()
		case wait:
			s.await(func() bool { return false })
		case overflow:
			s.end(registry.Overflow)
		case control:
			s.controlUp(s.up.unit)
			s.up.unit = nil
		case closed:
			s.deliver()
			s.closeFrom(&s.client, s.backend(), s.up.unit)
			s.up.unit, s.up.garbled = nil, true
		case garbled:
			s.end(registry.ClientProtocol)
			s.up.garbled = true
		case tooBig:
			s.end(registry.TooBig)
			s.up.garbled = true
		case more:
			if over = s.finishedWith(&s.client); over {
				break
			}
			if err := s.fill(&s.client); err != nil {
				if err == io.EOF {
					s.deliver() // what it wrote before it left
				}
				s.leave(&s.client, err)
			}
		}
	}
	s.attend()
	s.tellLast(&s.client, s.backend())
	s.client.in.Release()
}

// end ends the session and begins at once to carry that out.
func (s *Session) end(why registry.Reason) {
	s.rec.Close(registry.Ending{Reason: why})
	s.End(s.rec.Ending())
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

// upstroke is what the uplink forwards at once; only the uplink uses it.
type upstroke struct {
	batch
	to   *leg // the backend that was there when it began; nil: there was none
	kept bool // the queue has it; else it is written now or never
	late bool // the session ends: the queue knows nothing of it

	unit    *frame.Unit // read, and still to be taken
	begun   *leg        // has got all of the message that unit continues
	cut     bool        // since the session ends, something was left out
	garbled bool        // the client's bytes are not looked at any more
}

// step is what the uplink has to do next.
type step uint8

const (
	more     step = iota // read: all that was read is forwarded
	flush                // forward the batch
	wait                 // there is no room for the unit
	overflow             // … and that is the end
	control              // the unit is a ping or a pong
	closed               // … is a close frame
	garbled              // the client broke the protocol
	tooBig               // … sends a message that is too big
)

// collect takes units of messages that the client has sent until something else
// is to be done.
func (s *Session) collect() step {
	s.client.in.SetLimit(s.route.Settings().ClientMaxMessage)
	for !s.up.garbled {
		if s.up.unit == nil {
			u, err := s.client.in.Next()
			switch {
			case (u == nil || err != nil) && len(s.up.wire) > 0:
				return flush
			case errors.Is(err, frame.ErrTooBig):
				return tooBig
			case err != nil:
				return garbled
			case u == nil:
				return more
			}
			s.up.unit = u
		}
		u := s.up.unit
		switch {
		case u.Data():
			if do := s.take(u); do != more {
				return do
			}
			s.up.unit = nil
		case len(s.up.wire) > 0:
			return flush
		case u.Op == ws.OpClose:
			return closed
		default:
			return control
		}
	}
	s.client.in.Release()
	return more
}

// take adds a unit of a message to what is forwarded, and returns what has to be
// done first if it cannot.
func (s *Session) take(u *frame.Unit) step {
	b := &s.up
	if len(b.wire) > 0 && !b.fits(u) {
		return flush
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	to, late := s.receiver(u), s.closing
	if len(b.wire) > 0 {
		// What is passed and what is kept, which is not sent yet, do not mix: the
		// queue lets nothing pass before that.
		mixed := u.First && !b.kept && s.route.Settings().mode() != replay.Off
		if b.to != to || b.late != late || mixed {
			return flush
		}
	}
	if late && (b.cut || to == nil || !u.First && b.begun != to) {
		b.cut = true // it is not kept any more, and nothing may follow half a message
		return more
	}
	fate := replay.Passed
	if !late {
		fate = s.keep(u, to != nil)
	}
	switch fate {
	case replay.Full:
		switch {
		case len(b.wire) > 0:
			return flush // it may count as something that could be let go
		case to == nil && s.overflows():
			return overflow
		case to != nil:
			s.full(to)
		}
		return wait
	case replay.Dropped:
		b.begun = nil
		return more
	default:
		s.fullAt = 0
		b.add(u)
		b.to, b.kept, b.late, b.begun = to, fate == replay.Kept, late, to
		return more
	}
}

// full asks a backend for an acknowledgement, once for what it has, because there is
// no room for more until it comes. Session.mu is held.
func (s *Session) full(to *leg) {
	if s.fullAt == 0 {
		s.fullAt = s.now()
	}
	s.askNow(to)
}

// receiver returns the backend that may be written u right after what is in the
// batch, or nil: there is none, it is being left, or the queue comes first.
// Session.mu is held.
func (s *Session) receiver(u *frame.Unit) *leg {
	to := s.backend()
	switch {
	case len(s.up.wire) > 0 && s.up.to != to,
		!to.writable() || to.lost,
		len(s.up.wire) == 0 && s.queue.Backlog(),
		s.search.halt && u.First:
		return nil
	}
	return to
}

// keep asks the queue to keep a unit. Session.mu is held.
func (s *Session) keep(u *frame.Unit, live bool) replay.Fate {
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
func (s *Session) flushUp() {
	b := &s.up
	// Counted first, so that who sees a message finds it counted.
	s.rec.Count(registry.In, b.data, b.messages)
	unpassed := s.client.held()
	if b.unit != nil {
		unpassed += len(b.unit.Wire)
	}
	s.client.unpassed.Store(int64(unpassed))
	s.mu.Lock()
	to := b.to
	if to != nil && (to.lost || !to.writable()) {
		to = nil
	}
	switch {
	case to != nil:
		if b.kept {
			s.queue.Sent(len(b.wire))
		}
		s.beforeWrite(to)
	case !b.kept && !b.late:
		s.queue.Unsent(len(b.wire)) // for the verdict
	}
	// Another backend may be there already, or the old one wait for this.
	work := to == nil || to.wantPing || s.search.halt
	s.mu.Unlock()
	if to != nil {
		s.writeUp(to, b.wire, !b.late)
	}
	b.batch = batch{}
	if work {
		s.upWork.Store(true)
	}
}

// beforeWrite notes that messages marked as sent are about to be written, and
// whether a ping is to follow. Session.mu is held.
func (s *Session) beforeWrite(to *leg) {
	to.writing.Store(int64(s.now()))
	to.wantPing = to.wantPing || s.asks(to)
}

// writeUp writes messages to a backend. known says that the queue knows of them.
func (s *Session) writeUp(to *leg, wire []byte, known bool) {
	n, ok := s.write(to, wire)
	if mode := s.route.Settings().mode(); known && (!ok || mode != replay.Unacked) {
		s.mu.Lock()
		if !ok {
			s.queue.Unsent(len(wire) - n)
		}
		s.queue.Release(mode)
		s.rec.SetBuffered(s.queue.Buffered())
		s.mu.Unlock()
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
		s.beforeWrite(b)
		s.mu.Unlock()
		s.writeUp(b, wire, true)
		s.serve(b)
	}
}

// controlUp handles a ping or a pong of the client. Without a backend the
// session answers pings itself, after those that are on their way to one that is
// being left; pongs were for a backend that is gone.
func (s *Session) controlUp(u *frame.Unit) {
	payload := u.Unmasked()
	if u.Op == ws.OpPong && s.own.has(payload) {
		return
	}
	s.mu.Lock()
	b := s.backend()
	there := b.writable() && !b.lost
	pass := there
	if u.Op == ws.OpPing {
		// One that the backend cannot answer, because the client takes nothing, would
		// get stuck there, as our own would: it waits here, behind what is not taken.
		pass = there && s.calm(b, s.now())
		known := (pass || !there && !b.settled && s.pings.Clients()) && s.pings.Sent(payload, false, s.queue.Mark())
		pass = pass && known
		if !known && !s.closing {
			s.answer(payload)
		}
	}
	s.mu.Unlock()
	if pass {
		s.write(b, u.Wire)
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
