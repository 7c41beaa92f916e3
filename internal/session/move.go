// This file holds migration: a session moves from a backend that still serves to
// another one.

package session

import (
	"context"
	"errors"
	"time"
)

const (
	// boundaryTimeout is how long a move waits for the end of a message that is
	// under way.
	boundaryTimeout = 5 * time.Second
	// quietTimeout is how long it waits for the old backend to acknowledge what it
	// got, and to say nothing more, for at least quietPeriod.
	quietTimeout = 2 * time.Second
	quietPeriod  = 100 * time.Millisecond
	// moveAgain is the shortest pause before a planned move that failed is tried
	// again.
	moveAgain = 5 * time.Second
)

// Move begins to bring the session to another backend.
func (s *Session) Move() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.moveNow()
}

// moveNow is Move with Session.mu held.
func (s *Session) moveNow() error {
	b := s.backend()
	if s.closing || s.search.under || b.lost || b.parting != 0 || !b.writable() || s.client.heard {
		return ErrNotMovable
	}
	if !s.route.Others(b.upstream.Key()) {
		return ErrNoUpstream
	}
	if !s.rec.Migrate() {
		return ErrNotMovable
	}
	s.seek(b, true)
	return nil
}

// move brings the session from a live backend to another one and returns true;
// also if there is no other, in which case it stays. If the old one is lost
// meanwhile, or it cannot be known what it has read, it returns false: the session
// is held, and a backend has to be found that is told so.
func (s *Session) move(ctx context.Context, from *leg) bool {
	dials, hurry := context.WithCancel(ctx)
	s.mu.Lock()
	s.search.hurry = hurry
	if from.lost {
		hurry()
	}
	s.mu.Unlock()
	found := s.reach(dials, from)
	hurry()
	s.mu.Lock()
	switch {
	case from.lost:
		s.mu.Unlock()
		if found != nil {
			found.Discard()
		}
		return !s.waitFor(ctx, dormant, func() (bool, time.Duration) { return from.settled, dormant })
	case found == nil:
		s.stay()
		s.mu.Unlock()
		return true
	}
	s.search.found, s.search.halt = found, !s.closing
	s.wakeUplink()
	s.mu.Unlock()
	if !s.vacate(ctx, from) {
		found.Discard()
		return true
	}
	s.mu.Lock()
	s.search.found, s.search.halt = nil, false
	repeats := s.heldAt != 0
	s.mu.Unlock()
	if repeats {
		found.Discard() // it was told of none
		return false
	}
	s.takeOver(found)
	return true
}

// reach finds a backend on another upstream, or returns nil.
func (s *Session) reach(ctx context.Context, from *leg) *Found {
	try := s.route.Search(Interruption{Upstream: from.upstream.Key(), Move: true, Cause: codeGoingAway})
	for ctx.Err() == nil {
		found, err := try(ctx)
		if err == nil {
			return found
		}
		if errors.Is(err, ErrNoUpstream) {
			break
		}
	}
	return nil
}

// stay ends a move that is not possible. Session.mu is held.
func (s *Session) stay() {
	s.search.cancel()
	s.search = search{}
	s.moveAfter = s.now() + moveAgain + atRandom(moveAgain)
	s.rec.Stay()
	s.wakeUplink() // it may go on
	s.lookSoon(0)
}

// vacate takes leave of the old backend: after a whole message, its
// acknowledgement and a moment of quiet it is told that we go, and may finish. It
// returns true when the accounts with it are settled, and false if the session
// ended or stays.
func (s *Session) vacate(ctx context.Context, from *leg) bool {
	s.waitFor(ctx, boundaryTimeout, func() (bool, time.Duration) {
		return s.search.halted || from.lost, boundaryTimeout
	})
	s.mu.Lock()
	if !s.search.halted && !from.lost {
		if !s.closing {
			s.stay() // in the middle of a message that does not go on
		}
		s.mu.Unlock()
		return false
	}
	s.mu.Unlock()
	s.waitFor(ctx, quietTimeout, func() (bool, time.Duration) {
		if silence := s.now() - time.Duration(from.lastRead.Load()); silence < quietPeriod {
			return from.lost, quietPeriod - silence
		}
		return from.lost || !s.queue.Outstanding() || !s.mayAsk(from), quietTimeout
	})
	s.mu.Lock()
	if !from.lost && !s.closing && from.parting == 0 {
		from.parting, from.cause, from.blamed = s.now(), codeGoingAway, true
		from.leaveClose(codeGoingAway, "")
		s.wakeUplink()
		s.lookSoon(closingPeriod)
	}
	s.mu.Unlock()
	// The clock gives it up after partingTimeout; only the session's end is no end of this.
	return s.waitFor(ctx, dormant, func() (bool, time.Duration) { return from.settled, dormant })
}

// waitFor waits until ready says so and returns true, or returns false after
// limit or when ctx ends. ready is called with Session.mu held, at every event and
// again after the time it returns.
func (s *Session) waitFor(ctx context.Context, limit time.Duration, ready func() (bool, time.Duration)) bool {
	s.mu.Lock()
	events := s.search.events
	s.mu.Unlock()
	for by := time.Now().Add(limit); ; {
		s.mu.Lock()
		ok, again := ready()
		s.mu.Unlock()
		left := time.Until(by)
		if ok || left <= 0 {
			return ok
		}
		timer := time.NewTimer(max(min(again, left), time.Millisecond))
		select {
		case <-events:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false
		}
		timer.Stop()
	}
}

// report tells the seeker that the old backend has got its last message whole, and
// asks that backend for an acknowledgement. Only the uplink calls it.
func (s *Session) report(b *leg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.search.halt || s.search.halted || b.lost || len(s.up.wire) > 0 || !s.queue.Boundary() {
		return
	}
	s.search.halted = true
	s.search.notify()
	if b.writable() && s.queue.Outstanding() && s.mayAsk(b) && b.pingMark < s.queue.Mark() {
		s.wantPing(b)
	}
}
