package session

import (
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
	set, now := s.settings(), s.now()
	if s.closing {
		again, cut := s.checkClosing(now)
		s.timer.Reset(again)
		s.mu.Unlock()
		if cut {
			s.Abort()
		}
		return
	}
	end, due := s.limits(now, set)
	for side := range s.legs {
		why, next := s.checkLeg(&s.legs[side], now, set)
		if end.Reason == "" {
			end.Reason = why
		}
		due = min(due, next)
	}
	if end.Reason == "" {
		s.timer.Reset(s.sleep(now, due))
	}
	s.mu.Unlock()
	if end.Reason != "" {
		s.rec.Close(end)
	}
}

// sleep returns how long the clock may sleep when something is due at due: at
// most activePeriod while data moves. Session.mu is held.
func (s *Session) sleep(now, due time.Duration) time.Duration {
	// The flag is set before the look, and looked at by the pumps after they
	// have set their times: one of the two sees the other.
	s.drowsy.Store(true)
	for side := range s.legs {
		l := &s.legs[side]
		if l.writing.Load() != 0 || l.broken != 0 || now-time.Duration(l.lastRead.Load()) < activePeriod {
			s.drowsy.Store(false)
			return min(activePeriod, max(due-now, 0))
		}
	}
	return max(due-now, 0)
}

// limits checks what the route allows and whether an end was planned, and
// returns when to look again. Session.mu is held.
func (s *Session) limits(now time.Duration, set Settings) (end registry.Ending, due time.Duration) {
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
	case expired(s.lifeBegins, s.sooner(set.MaxLifetime)):
		end.Reason = registry.Lifetime
	case !any && expired(s.lifeBegins, set.FirstDataTimeout):
		end.Reason = registry.NoData
	case expired(lastData, set.IdleTimeout):
		end.Reason = registry.Idle
	}
	return end, due
}

// checkLeg judges one leg, leaves a ping with it if one is due, and returns why
// the session has to end and when to look again. Session.mu is held.
func (s *Session) checkLeg(l *leg, now time.Duration, set Settings) (registry.Reason, time.Duration) {
	due := now + dormant
	if l.broken != 0 {
		if now-l.broken >= answerTimeout {
			return vanished(l), due
		}
		due = l.broken + answerTimeout
	}
	// In this order: the pump ends reading before it ends writing.
	stuck := time.Duration(s.other(l).writing.Load())
	reading := time.Duration(l.reading.Load())
	if stuck != 0 {
		reading = 0 // who reads l is writing to the other leg
		if now-stuck >= activePeriod/2 && s.vanishedUnread(l) {
			return vanished(l), due
		}
	}
	if s.stalled(l, now, set.WriteTimeout) {
		if l.side == clientSide {
			return registry.WriteTimeout, due
		}
		return registry.BackendLost, due
	}
	dead, next := s.heartbeat(l, now, reading, set)
	if dead {
		if l.side == clientSide {
			return registry.PingTimeout, due
		}
		return registry.BackendLost, due
	}
	return "", min(due, next)
}

// vanishedUnread reports whether the peer of a leg that nobody reads is gone: its
// connection is reset, or it has finished and all it sent was passed on. While
// there is something to deliver, the other side's pace decides. Session.mu is held.
func (s *Session) vanishedUnread(l *leg) bool {
	info, known := l.ask()
	return known && (info.Reset || info.Finished && info.Unread == 0 && l.unpassed.Load() == 0)
}

// stalled reports whether a write to l has gone on for limit without the peer's
// kernel taking a byte. Session.mu is held.
func (s *Session) stalled(l *leg, now, limit time.Duration) bool {
	since := time.Duration(l.writing.Load())
	if since == 0 || limit <= 0 || now-since < activePeriod/2 {
		return false
	}
	if info, known := l.ask(); known && info.Acked != l.acked {
		l.acked, l.progressed = info.Acked, now
	}
	return now-max(since, l.progressed) >= limit
}

// heartbeat leaves a ping with l when one is due and reports whether the peer is
// dead: silent for PingTimeout after a ping, all of that while it was being
// read. Session.mu is held.
func (s *Session) heartbeat(l *leg, now, reading time.Duration, set Settings) (dead bool, next time.Duration) {
	if set.PingInterval <= 0 {
		l.nextPing = 0
		return false, now + dormant
	}
	if l.nextPing == 0 {
		l.nextPing = now + s.sooner(set.PingInterval)
	}
	next = now + dormant
	if s.unanswered(l) {
		pinged := time.Duration(l.pingDone.Load())
		if reading == 0 {
			next = now + activePeriod // suspended
		} else if by := max(pinged, reading) + set.PingTimeout; now >= by {
			return true, now
		} else {
			next = by
		}
	}
	// A shorter interval after a reload counts at once.
	l.nextPing = min(l.nextPing, now+s.sooner(set.PingInterval))
	if now >= l.nextPing {
		if reading == 0 || l.writing.Load() != 0 {
			return false, min(next, now+activePeriod) // it would have to wait behind data
		}
		l.nextPing = now + s.sooner(set.PingInterval)
		l.wantPing = true
		l.work.Store(true)
		s.other(l).wake()
		next = min(next, now+activePeriod) // has it been written?
	}
	return false, min(next, l.nextPing)
}

// unanswered reports whether nothing has come from l since the oldest ping that
// has to be answered.
func (s *Session) unanswered(l *leg) bool {
	return l.pingDone.Load() != 0 && l.pingBegan.Load() > l.lastRead.Load()
}
