// This file holds what happens when a backend is lost: the client is held, the
// accounts with the lost backend are settled, and another one takes over.

package session

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// codeBroken stands for a connection that broke without a close frame (RFC 6455
// §7.4.1).
const codeBroken = 1006

// partingTimeout is how long a backend that is left in good order has to close
// its connection after the close frames.
const partingTimeout = registry.ClosingTimeout

// lose notes that a backend's leg is gone and begins to hold the client. It
// returns false if the session does not survive that: it ends already, or the
// route does not hold. proven says that the backend has read all that was written.
func (s *Session) lose(l *leg, proven bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loseNow(l, proven)
}

// loseNow is lose with Session.mu held.
func (s *Session) loseNow(l *leg, proven bool) bool {
	if l.lost {
		return true
	}
	if s.closing {
		return false
	}
	s.blame(l)
	if s.route.Settings().ResumeTimeout <= 0 && l.parting == 0 {
		return false
	}
	if s.search.found == nil && !s.hold() {
		return false
	}
	l.lost, l.gone, l.proven = true, true, proven
	if l.cause == 0 {
		l.cause = codeBroken
	}
	l.cut()
	s.wakeUplink() // it settles accounts
	s.wakeDownlink()
	if s.search.hurry != nil {
		s.search.hurry() // what it finds would be of no use
	}
	s.search.notify()
	s.lookSoon(0)
	return true
}

// blame counts a backend that goes away as a failure of its upstream, once and only
// if it was not asked to go. Session.mu is held.
func (s *Session) blame(l *leg) {
	if !l.blamed {
		l.blamed = true
		s.route.Lost(l.upstream)
	}
}

// hold begins to hold the client, unless it is held already. Session.mu is held.
func (s *Session) hold() bool {
	if s.heldAt == 0 {
		if !s.rec.Hold() {
			return false
		}
		s.heldAt, s.fullAt = s.now(), 0
	}
	return true
}

// part handles a close frame of a backend that does not end the session: the
// backend goes away, or was told to. It is left in good order, which shows what it
// has read. It returns false for any other close frame.
func (s *Session) part(l *leg, u *frame.Unit) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	set := s.route.Settings()
	told := l.parting != 0 // it is being moved away from
	if s.closing || !told && (set.ResumeTimeout <= 0 || !slices.Contains(set.ResumeOn, u.Code)) {
		return false
	}
	l.heard, l.echo = true, u.Code
	if !told {
		if !s.hold() {
			return false
		}
		s.blame(l)
		l.cause, l.parting = u.Code, s.now()
		l.leaveClose(u.Code, "")
		s.wakeUplink()
	}
	s.search.notify()
	s.lookSoon(closingPeriod)
	return true
}

// proof reports whether the end of a backend's stream proves that it has read
// everything: its kernel has acknowledged all bytes, the last of them our close
// frame, and it has closed after that, without the reset that it would have sent for
// anything that its application left unread.
func (s *Session) proof(l *leg, err error) bool {
	s.mu.Lock()
	for l.said && l.saidAt == 0 {
		s.changed.Wait() // the answer to our close frame was faster than its writer
	}
	s.mu.Unlock()
	info, known := l.ask()
	s.mu.Lock()
	defer s.mu.Unlock()
	return err == io.EOF && l.heard && l.saidAt != 0 && !l.early && l.broken == 0 && known && info.Unacked == 0 && !info.Reset
}

// streamEnd returns how the connection of a backend ends whose stream has ended. Over
// TLS that was a close_notify; if the backend is left in good order, it is the FIN behind
// it that shows whether anything was left unread. Some send that only when they have our
// close_notify. They get it a moment later: one that has closed would answer with a reset.
func (s *Session) streamEnd(l *leg) error {
	t, ok := l.conn.(*tls.Conn)
	s.mu.Lock()
	wait := ok && l.parting != 0 && l.heard && !s.closing
	if wait && !l.ended {
		l.ended = true
		l.lastRead.Store(int64(s.now()))
	}
	answer := l.saidAt != 0 && s.now()-time.Duration(l.lastRead.Load()) >= closingPeriod
	s.mu.Unlock()
	if !wait {
		return io.EOF
	}
	below := t.NetConn()
	if answer {
		_ = t.CloseWrite()
	} else {
		_ = below.SetReadDeadline(time.Now().Add(closingPeriod))
		if s.downWork.Load() {
			return os.ErrDeadlineExceeded // its wake-up may be lost
		}
	}
	_, err := io.Copy(io.Discard, below)
	if err == nil {
		err = io.EOF
	}
	return err
}

// settle finds out what the lost backend leaves to the next one. Only the uplink
// calls it: nothing is being written to the leg.
func (s *Session) settle(l *leg) {
	s.mu.Lock()
	if !l.lost || l.settled || l.doomed || s.closing {
		s.mu.Unlock()
		return
	}
	set := s.route.Settings()
	if l.proven {
		s.queue.Ack(s.queue.Mark(), set.mode())
	}
	limit := set.ResumeLimit
	if s.search.found != nil {
		limit = 0 // it is left, it did not break
	}
	doubt := set.ResumeTimeout <= 0 && set.keeps() && s.queue.Outstanding() // left in a move, and nothing was kept
	verdict, replayed := s.queue.Lost(set.mode(), limit)
	if doubt {
		verdict = replay.InDoubt
	}
	s.inDoubt, s.suspect = replayed, s.queue.Suspect(limit)
	s.acquit()
	s.rec.SetBuffered(s.queue.Buffered())
	for _, ping := range s.pings.Lost() {
		s.answer(ping)
	}
	if s.flaps++; l.began == 0 || s.now()-l.began > set.ResumeMax {
		s.flaps = 0
	}
	reason, doomed := verdicts[verdict]
	if !doomed {
		if s.search.found != nil && replayed > 0 {
			doomed = !s.hold() // what was found was told of no repeats
		}
		s.seek(l, false)
		s.search.notify()
	}
	l.settled, l.doomed = !doomed, doomed
	s.mu.Unlock()
	if doomed {
		s.rec.Close(registry.Ending{Reason: reason})
	}
}

// verdicts are the reasons to end a session because of what a lost backend got.
var verdicts = map[replay.Verdict]registry.Reason{
	replay.InDoubt: registry.InDoubt,
	replay.Torn:    registry.Torn,
	replay.Poison:  registry.Poison,
}

// seek starts the seeker unless there is one. Session.mu is held.
func (s *Session) seek(from *leg, move bool) {
	if s.search.under || s.closing {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	s.search = search{under: true, stop: stop, events: make(chan struct{}, 1)}
	s.tasks.Add(1)
	go s.seeker(ctx, from, move)
}

// seeker looks for the backend that takes over from a leg, which is lost or, for a
// move, still serves. It ends when one has taken over, when a move turns out not
// to be possible, or with the session.
func (s *Session) seeker(ctx context.Context, from *leg, move bool) {
	defer s.tasks.Done()
	if move && s.move(ctx, from) {
		return
	}
	s.resume(ctx, from)
}

// resume dials until a backend takes over, pausing before each dial so that the
// clients of a backend do not all come back at once.
func (s *Session) resume(ctx context.Context, from *leg) {
	s.mu.Lock()
	i := Interruption{Upstream: from.upstream.Key(), Replayed: s.inDoubt, Suspect: s.suspect, Cause: from.cause}
	flaps := s.flaps
	s.mu.Unlock()
	try := s.route.Search(i)
	for attempt := 1; pause(ctx, s.backoff(attempt+flaps)); attempt++ {
		found, err := try(ctx)
		var refused *RefusedError
		switch {
		case err == nil:
			s.takeOver(found)
			return
		case errors.As(err, &refused):
			s.rec.Close(registry.Ending{Reason: registry.Refused})
			return
		case errors.Is(err, ErrNoUpstream):
			s.rec.Close(registry.Ending{Reason: registry.BackendLost})
			return
		}
	}
}

// backoff is the pause before the nth dial: at random between nothing and a
// bound that doubles (full jitter).
func (s *Session) backoff(n int) time.Duration {
	set := s.route.Settings()
	bound := min(set.ResumeMin, set.ResumeMax)
	for ; n > 1 && bound < set.ResumeMax; n-- {
		bound += min(bound, set.ResumeMax-bound)
	}
	return atRandom(bound)
}

// atRandom returns a time between nothing and bound.
func atRandom(bound time.Duration) time.Duration {
	if bound <= 0 {
		return 0
	}
	return rand.N(bound) //nolint:gosec // spreading load needs no secrets
}

// pause waits for d and reports whether ctx still lives.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// acquit ends the session's probation with its backend. Session.mu is held.
func (s *Session) acquit() {
	if s.acquitted != nil {
		s.acquitted()
		s.acquitted = nil
	}
}

// takeOver makes what was found the session's backend. If the session has ended
// meanwhile it is discarded.
func (s *Session) takeOver(f *Found) {
	if s.takenOver(f) {
		return
	}
	f.Discard() // without the lock: closing TLS in good order may block
	if f.Acquitted != nil {
		f.Acquitted()
	}
}

// takenOver is takeOver, unless the session has ended.
func (s *Session) takenOver(f *Found) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing || !s.rec.TakeOver(f.Upstream, f.Dial, s.inDoubt) {
		return false
	}
	l := s.newBackend(f.Upstream, f.Peer)
	s.acquitted = f.Acquitted
	l.began = s.now()
	s.current.Store(l)
	l.pingMark = s.queue.Mark() // nothing was written to it yet
	s.heldAt, s.fullAt, s.inDoubt = 0, 0, 0
	s.search.cancel()
	s.search = search{}
	s.wakeUplink()
	s.wakeDownlink()
	s.lookSoon(0)
	return true
}
