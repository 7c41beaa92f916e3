// This file holds the clock of a session and what it ends a session for.

package session

import (
	"math"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

const (
	// activePeriod is how often the clock looks at a session that moves data: a
	// write that blocks, and a peer that vanishes while nobody reads it, are
	// noticed within it.
	activePeriod = time.Second

	// closingPeriod is how often it looks at one that ends.
	closingPeriod = activePeriod / 4

	// answerTimeout is how long a peer that has taken a close frame may be
	// silent, or a write error unexplained.
	answerTimeout = time.Second

	// dormant is how long the clock sleeps when nothing is due.
	dormant = time.Hour

	// never is a time that does not come.
	never = time.Duration(math.MaxInt64)
)

// rouse ends the clock's long sleep: data moves again.
func (s *Session) rouse() {
	if s.drowsy.CompareAndSwap(true, false) {
		s.lookIn(activePeriod)
	}
}

// tick is the clock: it finds what is due, leaves work with the legs, ends the
// session if a limit says so, and sets the time of the next look. It never
// blocks. It is called by the timer, in a goroutine of its own.
func (s *Session) tick() {
	s.mu.Lock()
	if s.finished {
		s.mu.Unlock()
		return
	}
	// Settings and plan are read under the lock: who changes them asks for a
	// look afterwards, which this one cannot overrule.
	set, now := s.route.Settings(), s.now()
	s.lookAt = never
	if s.closing {
		again, cut := s.checkClosing(now)
		s.lookSoon(again)
		s.mu.Unlock()
		if cut {
			s.Abort()
		}
		return
	}
	end := s.look(now, set)
	s.mu.Unlock()
	if end.Reason != "" {
		s.rec.Close(end)
	}
}

// look checks all that may be due and sets the time of the next look, unless the
// session has to end. Session.mu is held.
func (s *Session) look(now time.Duration, set *Settings) registry.Ending {
	end, due := s.limits(now, set)
	why, next := s.checkLeg(&s.client, now, set)
	if end.Reason == "" {
		end.Reason = why
	}
	due = min(due, next)
	if b := s.backend(); !b.lost {
		lost, next := s.checkBackend(b, now, set)
		due = min(due, next)
		if lost {
			due = now // there is something new to look at
			if !s.loseNow(b, false) && end.Reason == "" {
				end.Reason = registry.BackendLost
			}
		}
	}
	if s.paused {
		s.upWork.Store(true) // other sessions may have given memory back
		s.changed.Broadcast()
		due = min(due, now+activePeriod)
	}
	due = min(due, s.planned(now, set))
	if end.Reason == "" {
		s.lookSoon(s.sleep(now, due))
	}
	return end
}

// sleep returns how long the clock may sleep when something is due at due: at
// most activePeriod while data moves. Session.mu is held.
func (s *Session) sleep(now, due time.Duration) time.Duration {
	// The flag is set before the look, and looked at by the pumps after they
	// have set their times: one of the two sees the other.
	s.drowsy.Store(true)
	for _, l := range [...]*leg{&s.client, s.backend()} {
		if l.writing.Load() != 0 || l.broken != 0 && !l.lost || now-time.Duration(l.lastRead.Load()) < activePeriod {
			s.drowsy.Store(false)
			return min(activePeriod, max(due-now, 0))
		}
	}
	return max(due-now, 0)
}

// limits checks what the route allows and whether an end was planned, and
// returns when to look again. Session.mu is held.
func (s *Session) limits(now time.Duration, set *Settings) (end registry.Ending, due time.Duration) {
	due = now + dormant
	if at, planned := s.rec.PlannedEnd(); !at.IsZero() {
		wait := time.Until(at)
		if wait <= 0 {
			return planned, due
		}
		due = min(due, now+wait)
	}
	expired := func(since, limit time.Duration) bool {
		if limit <= 0 {
			return false
		}
		due = min(due, max(since+limit, now))
		return now >= since+limit
	}
	lastData, any := s.rec.LastData()
	switch {
	case s.heldAt != 0 && (set.ResumeTimeout <= 0 || expired(s.heldAt, set.ResumeTimeout)):
		end.Reason = registry.ResumeTimeout
	case expired(s.lifeBegins, s.sooner(set.MaxLifetime)):
		end.Reason = registry.Lifetime
	case !any && expired(s.lifeBegins, set.FirstDataTimeout):
		end.Reason = registry.NoData
	case expired(lastData, set.IdleTimeout):
		end.Reason = registry.Idle
	}
	return end, due
}

// planned begins a move that is due and returns when to look again. A session on
// an upstream that is to be left, for which nobody has planned, plans its own: it
// got there while the config changed. Session.mu is held.
func (s *Session) planned(now time.Duration, set *Settings) (due time.Duration) {
	due = now + dormant
	b := s.backend()
	if b.lost || s.search.under {
		return due
	}
	at := s.rec.PlannedMove()
	if at.IsZero() {
		if !s.route.Leaves(b.upstream.Key()) {
			return due
		}
		at = s.rec.PlanMove(time.Now().Add(atRandom(set.DrainWindow)))
	}
	by := max(now+time.Until(at), s.moveAfter)
	if by > now {
		return by
	}
	if s.moveNow() != nil {
		s.moveAfter = now + moveAgain // nowhere to go, or not now
		return s.moveAfter
	}
	return due
}

// checkLeg judges one leg, leaves a ping with it if one is due, and returns why
// the session has to end and when to look again; for a backend that means that it
// is lost. Session.mu is held.
func (s *Session) checkLeg(l *leg, now time.Duration, set *Settings) (registry.Reason, time.Duration) {
	due := now + dormant
	if l.broken != 0 {
		if now-l.broken >= answerTimeout {
			return vanished(l), due
		}
		due = l.broken + answerTimeout
	}
	// In this order: the pump ends reading before it ends writing.
	unread := time.Duration(max(s.other(l).writing.Load(), l.waiting.Load()))
	reading := time.Duration(l.reading.Load())
	if unread != 0 {
		reading = 0 // who reads l does something else
		if now-unread >= activePeriod/2 && s.vanishedUnread(l) {
			return vanished(l), due
		}
		due = min(due, now+activePeriod)
	}
	if l.writing.Load() != 0 || s.unanswered(l) {
		l.observe(now)
	}
	if l.stalled(now, set.WriteTimeout) {
		return unheard(l, registry.WriteTimeout), due
	}
	dead, next := s.heartbeat(l, now, reading, set)
	if dead {
		return unheard(l, registry.PingTimeout), due
	}
	return "", min(due, next)
}

// unheard is the reason when a limit says that the peer of l is not there.
func unheard(l *leg, client registry.Reason) registry.Reason {
	if l.side == clientSide {
		return client
	}
	return registry.BackendLost
}

// checkBackend reports whether the backend is lost, asks it for acknowledgements,
// and returns when to look again. Session.mu is held.
func (s *Session) checkBackend(b *leg, now time.Duration, set *Settings) (lost bool, due time.Duration) {
	why, due := s.checkLeg(b, now, set)
	if why != "" {
		return true, due
	}
	if s.fullAt != 0 && set.WriteTimeout > 0 {
		// The client is read no further because of what the backend does not take.
		by := max(s.fullAt, s.ackedAt) + set.WriteTimeout
		if set.PingInterval <= 0 || !b.upstream.Answers.Load() {
			by += set.PingTimeout // that long its kernel's acknowledgement has to wait
		}
		if now >= by {
			return true, due
		}
		due = min(due, by)
	}
	if b.parting != 0 {
		// It has its time from when it could know.
		by := max(b.parting, b.saidAt) + partingTimeout
		return now >= by, min(due, by, now+closingPeriod)
	}
	return false, min(due, s.checkAcks(b, now, set))
}

// vanishedUnread reports whether the peer of a leg that nobody reads is gone: its
// connection is reset, or it has finished and all it sent was passed on. While
// there is something to deliver, the other side's pace decides. A client that has
// said its last word is waited for. Session.mu is held.
func (s *Session) vanishedUnread(l *leg) bool {
	info, known := l.ask()
	if !known {
		return false
	}
	lastWord := l.side == clientSide && l.waiting.Load() != 0 && (s.queue.Buffered() > 0 || s.owes())
	return info.Reset || info.Finished && info.Unread == 0 && l.unpassed.Load() == 0 && !lastWord
}

// observe notes whether the peer's kernel has acknowledged more. While bytes wait
// here because there is no room at the peer, that means that its application reads,
// however slowly: a ping is behind all of that. What is merely on its way says
// nothing: the kernel of a frozen peer goes on taking it. Session.mu is held.
func (l *leg) observe(now time.Duration) {
	info, known := l.ask()
	if !known || info.Acked == l.acked {
		return
	}
	l.acked, l.progressed = info.Acked, now
	if info.Unsent > 0 {
		l.taking = now
	}
}

// stalled reports whether a write to l has gone on for limit without the peer's
// kernel taking a byte. Session.mu is held.
func (l *leg) stalled(now, limit time.Duration) bool {
	since := time.Duration(l.writing.Load())
	return since != 0 && limit > 0 && now-max(since, l.progressed) >= limit
}
