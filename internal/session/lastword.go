// This file holds what comes between a client's last word, a close frame or a FIN,
// and its end: what it sent before is delivered.

package session

import "time"

// unprovenPatience is how long the end waits for the first pong ever of an upstream. Most
// that answer pings have done so long before.
const unprovenPatience = 250 * time.Millisecond

// deliver waits, when the client has said its last word, until a backend has got
// all of its messages and, where that matters, has read them, or there is nothing to
// deliver, or the session ends. The end must not come sooner: after it there is
// neither another backend for what this one leaves unread, nor anybody to be told.
func (s *Session) deliver() {
	since := s.now()
	done := func() bool {
		b := s.backend()
		live := b.writable() && !b.lost
		if b.lost && s.search.found != nil {
			return false // the next one is about to take over, and may have the last word
		}
		got := s.queue.Empty() || live && !s.queue.Backlog() && !s.search.halt
		return got && (!s.owes() || live && !s.tells(b, since))
	}
	for asked := uint64(0); ; {
		s.mu.Lock()
		over := s.closing || done()
		if mark := s.queue.Mark(); !over && s.owes() && asked != mark {
			s.askNow(s.backend())
			asked = mark // if that fails, the clock asks again
			s.lookSoon(unprovenPatience)
		}
		s.mu.Unlock()
		if over {
			return
		}
		s.await(done)
		s.attend()
	}
}

// owes reports whether the backend, or if that is lost the accounts with it, has yet
// to show what became of messages that were written. Session.mu is held.
func (s *Session) owes() bool {
	return s.route.Settings().wantsAcks() && s.queue.Outstanding()
}

// tells reports whether a live backend can be expected to show what it has read, by
// a pong that somebody would read. Session.mu is held.
func (s *Session) tells(b *leg, since time.Duration) bool {
	now := s.now()
	return s.route.Settings().PingInterval > 0 && s.calm(b, now) &&
		(b.upstream.Answers.Load() || !b.upstream.Warned.Load() && now-since < unprovenPatience)
}

// askNow asks a backend what it has read, once for what it has. Session.mu is held.
func (s *Session) askNow(b *leg) {
	if b.writable() && s.queue.Outstanding() && b.pingMark < s.queue.Mark() && s.mayAsk(b) && s.calm(b, s.now()) {
		b.wantPing = true
		s.upWork.Store(true)
	}
}
