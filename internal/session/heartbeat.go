// This file holds what pings are for: they show that a peer is alive, and what a
// backend has read.

package session

import "time"

const (
	// askPeriod is the pace of the pings that ask for acknowledgements; backends
	// that limit the frames they accept count them.
	askPeriod = time.Second
	// askBytes is after how many bytes a ping may be sent sooner than that …
	askBytes = 64 << 10
	// … unless so many are unanswered: some servers end a peer that has dozens.
	mostAsked = 4
	// calm is how long ago the other peer must have been slow: a ping that goes to
	// a backend whose answers nobody takes gets stuck there, and ends it
	// (coder/websocket) or is lost (gorilla).
	calm = time.Second
)

// heartbeat leaves a ping with l when one is due and reports whether the peer is
// dead: silent for PingTimeout after a ping, all of that while it was being
// read. Session.mu is held.
func (s *Session) heartbeat(l *leg, now, reading time.Duration, set *Settings) (dead bool, next time.Duration) {
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
		} else if by := max(pinged, reading, l.taking) + set.PingTimeout; now >= by {
			return true, now
		} else {
			next = min(by, now+activePeriod) // it may take what is in front of the ping
		}
	}
	// A shorter interval after a reload counts at once.
	l.nextPing = min(l.nextPing, now+s.sooner(set.PingInterval))
	if now >= l.nextPing {
		if reading == 0 || l.writing.Load() != 0 || !s.calm(l, now) {
			return false, min(next, now+activePeriod) // it would have to wait behind data
		}
		l.nextPing = now + s.sooner(set.PingInterval)
		s.wantPing(l)
		next = min(next, now+activePeriod) // has it been written?
	}
	return false, min(next, l.nextPing)
}

// wantPing leaves a ping with l. Session.mu is held.
func (s *Session) wantPing(l *leg) {
	l.wantPing = true
	s.wakeWriter(l)
}

// unanswered reports whether nothing has come from l since the oldest ping that
// has to be answered.
func (s *Session) unanswered(l *leg) bool {
	return l.pingDone.Load() != 0 && l.pingBegan.Load() > l.lastRead.Load()
}

// calm reports whether what comes from l is taken by the other peer without delay.
func (s *Session) calm(l *leg, now time.Duration) bool {
	other := s.other(l)
	slow := time.Duration(other.slow.Load())
	writing := time.Duration(other.writing.Load())
	return (slow == 0 || now-slow >= calm) && (writing == 0 || now-writing < slowWrite)
}

// mayAsk reports whether a ping to a backend is an answer worth waiting for.
// Session.mu is held.
func (s *Session) mayAsk(b *leg) bool {
	return s.route.Settings().PingInterval > 0 && (b.upstream.Answers.Load() || s.pings.Unanswered() == 0)
}

// asks reports whether a ping is to follow right after messages that are about
// to be written to b: that costs no wake-up, and frees most messages after one
// round trip. Session.mu is held.
func (s *Session) asks(b *leg) bool {
	set, now := s.route.Settings(), s.now()
	if !set.wantsAcks() || !s.mayAsk(b) || !s.queue.Outstanding() || !s.calm(b, now) {
		return false
	}
	if s.queue.Mark()-b.pingMark >= askBytes {
		return s.pings.Unanswered() < mostAsked
	}
	// What is left of a replay follows at once: one ping for all of it.
	return !s.queue.Backlog() && (b.lastPing == 0 || now-b.lastPing >= askPeriod)
}

// checkAcks leaves a ping with b if messages wait for their acknowledgement and
// none is under way that would bring it, and returns when to look again. For an
// upstream that answers no pings its kernel has to do. Session.mu is held.
func (s *Session) checkAcks(b *leg, now time.Duration, set *Settings) (due time.Duration) {
	if !set.wantsAcks() || !s.queue.Outstanding() {
		return now + dormant
	}
	due = now + closingPeriod
	silent := b.pinged != 0 && now-b.pinged >= set.PingTimeout && !b.upstream.Answers.Load()
	if silent && !b.upstream.Warned.Swap(true) {
		s.route.Unanswering(b.upstream)
	}
	if set.PingInterval <= 0 || silent {
		s.drainedAcks(b, now, set)
		return due + activePeriod
	}
	if wait := b.lastPing + askPeriod - now; wait > 0 && b.lastPing != 0 {
		return now + wait
	}
	if !b.writable() || b.reading.Load() == 0 || b.writing.Load() != 0 || !s.calm(b, now) {
		return due
	}
	asked := b.pingMark >= s.queue.Mark() && s.pings.Unanswered() > 0
	// A pong may be lost for ever (gorilla drops it when it cannot write): if
	// other frames came since, the ping is repeated.
	overdue := asked && now-b.lastPing >= set.PingTimeout/2 && time.Duration(b.lastRead.Load()) > b.lastPing
	if overdue || !asked && s.mayAsk(b) {
		s.wantPing(b)
	}
	return now + activePeriod
}

// drainedAcks takes messages for acknowledged whose bytes the backend's kernel had
// acknowledged PingTimeout ago. Session.mu is held.
func (s *Session) drainedAcks(b *leg, now time.Duration, set *Settings) {
	if b.drained != 0 && now-b.drained >= set.PingTimeout {
		s.acknowledge(b.drainMark)
		b.drained = 0
	}
	if b.drained == 0 && s.queue.Outstanding() && b.writing.Load() == 0 {
		if info, known := b.ask(); !known || info.Unacked == 0 {
			b.drained, b.drainMark = now, s.queue.Mark()
		}
	}
}
