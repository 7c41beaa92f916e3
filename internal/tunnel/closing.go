// This file holds how a tunnel ends.
//
// What was on its way when the end was decided is delivered first; then, within
// a second, or within ClosingTimeout if that delivery takes longer:
//
//	eof                                 both peers have ended, and were told
//	reset, dead                         the other peer gets a reset as well
//	all others, decided here            both peers get a FIN …
//	… and do not take what is for them, or do not end  a reset

package tunnel

import (
	"errors"
	"math"
	"syscall"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// reasonOf returns what an error of a connection says about its peer.
func reasonOf(err error) registry.Reason {
	for _, dead := range [...]error{
		// The second to fourth are what ICMP said before the last probe was given up.
		syscall.ETIMEDOUT, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN,
	} {
		if errors.Is(err, dead) {
			return registry.Dead
		}
	}
	return registry.Reset
}

// End lets the pumps deliver what is on its way and tell the peers. The record
// calls it once its end is decided. Only the first call counts.
func (t *Tunnel) End(e registry.Ending) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closing {
		return
	}
	t.closing = true
	t.closingBy = t.now() + time.Until(t.rec.Deadline())
	if e.Reason == registry.Reset || e.Reason == registry.Dead {
		t.abortive = true
		t.closingBy = min(t.closingBy, t.now()+answerTimeout)
	}
	// The flag first: a pump that is woken looks at it, and lifts the deadline
	// under the lock.
	t.ending.Store(true)
	_ = t.client.conn.SetReadDeadline(past)
	_ = t.backend.conn.SetReadDeadline(past)
	t.lookIn(closingPeriod)
}

// lastBytes is called by a pump that finds the end decided. It returns how many
// bytes it still has to relay: those that have arrived.
func (t *Tunnel) lastBytes(p *pump) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := p.from
	_ = l.conn.SetReadDeadline(time.Time{})
	switch {
	case p.to.gone:
		return 0
	case t.abortive && l.gone:
		return math.MaxInt // reading it does not block any more
	case t.abortive:
		return 0
	}
	info, _ := l.ask()
	if l.raw == nil && info.Unread > 0 {
		// What lies below a wrapper may be more than what comes out of it.
		_ = l.conn.SetReadDeadline(time.Now().Add(closingPeriod))
	}
	return info.Unread
}

// ended notes that p has relayed all that its leg will ever send. It returns false if
// that is no end, but what a broken connection looks like after another goroutine
// was given the error: that one decides.
func (t *Tunnel) ended(p *pump) bool {
	t.mu.Lock()
	// A leg that was told the end looks hung up as soon as it has ended; it is told
	// under the lock, so it was not yet.
	if p.from.toldAt == 0 && hungUp(p.from.conn) {
		if err := pendingError(p.from.conn); err != nil { // it came right after the end
			p.from.gone = true
			t.mu.Unlock()
			t.rec.Close(registry.Ending{Reason: reasonOf(err)})
			return false
		}
		t.breaks(p.from)
		return false
	}
	p.from.finished = true
	if t.eofAt == 0 {
		t.eofAt = t.now()
	}
	both := p.to.finished
	// Not at once: most that end one way end the other way soon.
	t.lookIn(activePeriod)
	if limit := t.route.Settings().HalfOpenTimeout; limit > 0 {
		t.lookIn(limit)
	}
	t.mu.Unlock()
	if !both {
		t.rec.HalfClose()
	}
	return true
}

// tell tells p's peer the end. One that cannot be told without being closed ends
// the tunnel.
func (t *Tunnel) tell(p *pump) {
	t.mu.Lock()
	if t.abortive || p.to.gone || p.to.broken != 0 {
		t.mu.Unlock()
		return
	}
	p.to.toldAt = t.now()
	t.mu.Unlock()
	if !p.to.closeWrite() {
		t.rec.Close(registry.Ending{Reason: registry.EOF})
	}
}

// broke notes that a read or write has failed. What the error says ends the
// tunnel. A broken pipe says only that somebody else got the error, or that the
// peer closed first: whoever reads the leg finds out, else the clock decides.
func (t *Tunnel) broke(l *leg, err error) {
	t.mu.Lock()
	if errors.Is(err, syscall.EPIPE) {
		t.breaks(l)
		return
	}
	l.gone = true
	t.mu.Unlock()
	t.rec.Close(registry.Ending{Reason: reasonOf(err)})
}

// breaks notes that a leg is broken, and that the pump which has found out was not
// told why. If the other pump was not either, nobody will be. Tunnel.mu is held, and
// let go.
func (t *Tunnel) breaks(l *leg) {
	if l.broken == 0 {
		l.broken = t.now()
		t.lookIn(answerTimeout)
		t.mu.Unlock()
		return
	}
	l.gone = true
	t.mu.Unlock()
	t.rec.Close(registry.Ending{Reason: registry.Reset})
}

// lingers reports whether p should wait for the end of the peer that it reads: one
// that is told the end while something it sent is unread gets a reset, which may
// cost it what it has not read itself (RFC 1122 §4.2.2.13).
func (t *Tunnel) lingers(p *pump) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.abortive || p.from.gone || p.from.finished {
		return false
	}
	_ = p.from.conn.SetReadDeadline(time.Time{})
	return true
}

// checkClosing looks how far the end has come. It gives a peer up that was told
// the end, has taken all bytes and has not answered for a second, and cuts both
// when the time is over. Tunnel.mu is held.
func (t *Tunnel) checkClosing(now time.Duration) (again time.Duration, cut bool) {
	if now >= t.closingBy {
		return closingPeriod, true
	}
	if t.flushed != nil {
		if t.allTaken() {
			t.noMoreFlushing()
		}
		return min(flushPeriod, t.closingBy-now), false
	}
	for _, l := range [...]*leg{&t.client, &t.backend} {
		if l.gone || l.toldAt == 0 || now-l.toldAt < answerTimeout {
			continue
		}
		if info, known := l.ask(); !known || info.Unacked == 0 {
			l.gone = true
			_ = l.conn.SetReadDeadline(past)
		}
	}
	return min(closingPeriod, t.closingBy-now), false
}

// finish closes both legs and the record, after both pumps have left.
func (t *Tunnel) finish() {
	t.rec.Close(registry.Ending{Reason: t.verdict()})
	t.End(t.rec.Ending()) // whoever decided it may not have got to that yet
	t.mu.Lock()
	abortive := t.abortive
	if abortive && !t.allTaken() {
		// A reset would throw away what the other peer's kernel has not got yet.
		done := make(chan struct{})
		t.flushed = done
		t.lookIn(flushPeriod)
		t.mu.Unlock()
		<-done
		t.mu.Lock()
	}
	t.finished = true
	t.timer.Stop()
	t.mu.Unlock()
	for _, l := range [...]*leg{&t.client, &t.backend} {
		// Who was told an end that was decided here, and does not end, may be a proxy that
		// waits for a client that has nothing to say: it would not hear of it else.
		if abortive || l.toldAt != 0 && !l.finished {
			l.cut(true)
		}
		_ = l.conn.Close()
	}
	t.rec.Done()
}

// verdict is the reason if nobody has given one.
func (t *Tunnel) verdict() registry.Reason {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.complete() {
		return registry.EOF
	}
	return registry.Reset
}

// complete reports whether both peers have ended, and all that they sent was relayed.
// Tunnel.mu is held.
func (t *Tunnel) complete() bool {
	return t.client.finished && t.backend.finished && t.client.broken == 0 && t.backend.broken == 0
}

// allTaken reports whether there is nothing that a reset would throw away.
// Tunnel.mu is held.
func (t *Tunnel) allTaken() bool {
	for _, l := range [...]*leg{&t.client, &t.backend} {
		if l.gone || l.broken != 0 {
			continue
		}
		if info, known := l.ask(); known && !info.Reset && info.Unacked > 0 {
			return false
		}
	}
	return true
}

// noMoreFlushing lets the resets go out. Tunnel.mu is held.
func (t *Tunnel) noMoreFlushing() {
	if t.flushed != nil {
		close(t.flushed)
		t.flushed = nil
	}
}
