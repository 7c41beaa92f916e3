// This file holds the downlink: what the backends send goes to the client, and
// what else is left for it.

package session

import (
	"errors"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// downlink is the only reader of the backends and the only writer of the client.
// It reads each backend's leg to its end, closes it, and goes on with the next one;
// it ends with the session, or when the clock gives the backend up, and
// closes down.
func (s *Session) downlink(down chan<- struct{}) {
	defer close(down)
	for l := s.backend(); l != nil; l = s.next(l) {
		if !s.pumpDown(l) {
			// The client has the beginning of a message whose end will never come.
			s.rec.Close(registry.Ending{Reason: registry.Torn})
			break
		}
	}
	s.tellLast(s.backend(), &s.client)
}

// pumpDown forwards what a backend sends until nothing more comes. It returns
// false if that ended inside a message. Frames that lie side by side are written
// at once.
func (s *Session) pumpDown(l *leg) (whole bool) {
	var b batch
	garbled := false // the backend's bytes are not looked at any more
	for {
		for !garbled {
			u, err := s.collectDown(l, &b)
			if u == nil {
				s.flushDown(l, &b, 0)
				if garbled = err != nil; garbled {
					s.offended(l, err)
				}
				break
			}
			switch {
			case u.Op == ws.OpClose:
				s.flushDown(l, &b, len(u.Wire))
				s.closeFrom(l, &s.client, u)
				garbled = true // it was the last one
			case u.Op != ws.OpPong || s.pongFrom(l, &b, u):
				if !b.fits(u) {
					s.flushDown(l, &b, len(u.Wire))
				}
				b.add(u)
			}
		}
		if garbled {
			l.in.Release()
		}
		s.serveClient()
		if s.finishedWith(l) {
			break
		}
		if err := s.fill(l); err != nil {
			s.leave(l, err)
		}
	}
	l.in.Release()
	return !l.in.MidMessage()
}

// offended ends the session because of what a backend sent.
func (s *Session) offended(l *leg, err error) {
	why := registry.BackendBroke
	if errors.Is(err, frame.ErrTooBig) {
		why = registry.TooBig
		s.mu.Lock()
		l.tooBig = true
		s.mu.Unlock()
	}
	s.rec.Close(registry.Ending{Reason: why})
}

// next waits for the leg that takes over from old, and closes that. It returns
// nil when the session ends.
func (s *Session) next(old *leg) *leg {
	for {
		s.mu.Lock()
		for !s.closing && s.backend() == old && !s.downWork.Load() {
			s.changed.Wait()
		}
		l, over := s.backend(), s.closing
		if l != old {
			s.reading = l
			s.mu.Unlock()
			old.close()
			return l
		}
		s.mu.Unlock()
		if over {
			return nil
		}
		s.serveClient()
	}
}

// serveClient does what was left for the downlink.
func (s *Session) serveClient() {
	for s.downWork.Swap(false) {
		s.mu.Lock()
		pongs := s.pongs
		s.pongs = nil
		ok := s.client.writable()
		s.mu.Unlock()
		if ok && len(pongs) > 0 {
			s.write(&s.client, pongFrames(pongs))
		}
		s.serve(&s.client)
	}
}

func pongFrames(payloads [][]byte) (wire []byte) {
	for _, p := range payloads {
		wire = frame.Append(wire, ws.OpPong, p, false)
	}
	return wire
}

// collectDown takes units that a backend has sent into the batch until something
// else is to be done. The unit that asks for it is returned.
func (s *Session) collectDown(l *leg, b *batch) (*frame.Unit, error) {
	l.in.SetLimit(s.route.Settings().ServerMaxMessage)
	for {
		u, err := l.in.Next()
		if err != nil || u == nil {
			return nil, err
		}
		if !u.Data() && u.Op != ws.OpPing || !b.fits(u) {
			return u, nil
		}
		b.add(u)
	}
}

// flushDown writes the batch, counts it, and empties it. After the client was
// told the end it is dropped. next is the size of a unit that is to follow.
func (s *Session) flushDown(l *leg, b *batch, next int) {
	if len(b.wire) > 0 {
		l.unpassed.Store(int64(l.held() + next))
		s.mu.Lock()
		ok := s.client.writable()
		s.mu.Unlock()
		if ok {
			// Counted first, so that who sees a message finds it counted.
			if b.frames > 0 {
				s.rec.Count(registry.Out, b.data, b.messages)
			}
			s.write(&s.client, b.wire)
		}
	}
	*b = batch{}
}

// pongFrom learns from a backend's pong what the backend has read, answers the
// client's pings that it skipped, and reports whether the pong is the client's.
func (s *Session) pongFrom(l *leg, b *batch, u *frame.Unit) (pass bool) {
	own := s.own.has(u.Payload)
	s.mu.Lock()
	if l != s.backend() || l.lost {
		s.mu.Unlock()
		return false // the session has answered for it
	}
	m := s.pings.Pong(u.Payload)
	if m.Known {
		l.upstream.Answers.Store(true)
	}
	// Some servers send empty pongs that nobody asked for (RFC 6455 §5.5.3), which
	// may look like the answer to an empty ping of the client.
	if m.Known && len(u.Payload) > 0 {
		s.acknowledge(m.Acked)
	}
	ok := s.client.writable()
	s.mu.Unlock()
	if len(m.Skipped) > 0 {
		s.flushDown(l, b, 0)
	}
	if ok && len(m.Skipped) > 0 {
		s.write(&s.client, pongFrames(m.Skipped))
	}
	return !own
}

// acknowledge lets what was sent before pos go: the backend has read it.
// Session.mu is held.
func (s *Session) acknowledge(pos uint64) {
	set := s.route.Settings()
	s.queue.Ack(pos, set.mode())
	s.ackedAt = s.now()
	if !s.queue.Suspect(set.ResumeLimit) {
		s.acquit()
	}
	s.rec.SetBuffered(s.queue.Buffered())
	if s.paused {
		s.upWork.Store(true)
		s.changed.Broadcast()
	}
	s.search.notify()
}
