// This file holds the clock of a tunnel and what it ends a tunnel for.

package tunnel

import (
	"math"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

const (
	// activePeriod is how often the clock looks at a tunnel of which one leg is
	// not being read: a peer that leaves meanwhile is noticed within it.
	activePeriod = time.Second

	// closingPeriod is how often it looks at one that ends, and flushPeriod at one
	// that has only to get rid of its last bytes.
	closingPeriod = activePeriod / 4
	flushPeriod   = activePeriod / 50

	// answerTimeout is how long a peer that was told the end may be silent, and a
	// broken leg without an explanation.
	answerTimeout = time.Second

	// dormant is a time that never comes.
	dormant = time.Duration(math.MaxInt64)
)

// tick is the clock: it finds what is due, ends the tunnel if a limit says so, and
// sets the time of the next look. It never blocks. It is called by the timer, in
// a goroutine of its own.
func (t *Tunnel) tick() {
	t.mu.Lock()
	if t.finished {
		t.mu.Unlock()
		return
	}
	now := t.now()
	t.lookAt = dormant
	if t.closing {
		again, cut := t.checkClosing(now)
		t.lookIn(again)
		t.mu.Unlock()
		if cut {
			t.Abort()
		}
		return
	}
	// Settings and plan are read under the lock: who changes them asks for a
	// look afterwards, which this one cannot overrule.
	set := t.route.Settings()
	t.apply(set)
	c := check{t: t, set: set, now: now, due: dormant}
	c.all()
	if c.end.Reason == "" {
		t.sleep(now, c.due)
	}
	t.mu.Unlock()
	if c.halfOpen {
		t.rec.HalfClose()
	}
	if c.warn {
		t.route.Inactive(t.rec, c.idle)
	}
	if c.end.Reason != "" {
		t.rec.Close(c.end)
	}
}

// apply tells the sockets what has changed. An error means that the connection is
// broken; who reads it knows more. Tunnel.mu is held.
func (t *Tunnel) apply(set *Settings) {
	if t.applied == nil || t.applied.Sockets != set.Sockets {
		_ = set.Sockets.Apply(t.client.conn)
		_ = set.Sockets.Apply(t.backend.conn)
	}
	t.applied = set
}

// sleep sets the time of the next look, when something is due at due: at most
// activePeriod while a pump waits for room. Tunnel.mu is held.
func (t *Tunnel) sleep(now, due time.Duration) {
	// The flag is set before the look, and looked at by the pumps after they
	// have said that they wait: one of the two sees the other.
	t.drowsy.Store(true)
	if t.up.waiting.Load() != 0 || t.down.waiting.Load() != 0 {
		t.drowsy.Store(false)
		due = min(due, now+activePeriod)
	}
	if due != dormant {
		t.lookIn(due - now)
	}
}

// rouse ends the clock's long sleep: a pump waits for room.
func (t *Tunnel) rouse() {
	if !t.drowsy.CompareAndSwap(true, false) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lookIn(activePeriod)
}

// lookIn lets the clock look after d, if it would not sooner. Tunnel.mu is held.
func (t *Tunnel) lookIn(d time.Duration) {
	d = max(d, 0)
	if at := t.now() + d; !t.finished && at < t.lookAt {
		t.lookAt = at
		t.timer.Reset(d)
	}
}

// check is one look of the clock. Tunnel.mu is held all the while.
type check struct {
	t   *Tunnel
	set *Settings
	now time.Duration

	due      time.Duration // when to look again
	end      registry.Ending
	warn     bool
	idle     time.Duration
	halfOpen bool
}

func (c *check) all() {
	t := c.t
	if at, why := t.rec.PlannedEnd(); !at.IsZero() {
		wait := time.Until(at)
		if wait <= 0 {
			c.end = why
			return
		}
		c.due = c.now + wait
	}
	pending, patience := time.Duration(t.pending.Load()), c.set.StuckTimeout
	if t.backend.finished {
		patience = 0 // no answer will come: its end has its own limit
	}
	lifetime := c.set.lifetime()
	lifetime -= time.Duration(t.jitter * float64(lifetime))
	switch {
	case c.expired(t.lifeBegins, lifetime):
		c.end.Reason = registry.Lifetime
	case t.eofAt != 0 && c.expired(t.eofAt, c.set.HalfOpenTimeout):
		c.end.Reason = registry.HalfOpenTimeout
	case pending != 0 && c.expired(pending, patience):
		c.end.Reason = registry.Stuck
	case c.inactive():
		c.end.Reason = registry.Idle
	default:
		if pending == 0 {
			c.expired(c.now, patience) // should bytes come right now
		}
		c.unread(&t.up)
		c.unread(&t.down)
	}
}

// expired reports whether limit has passed since; if not, the clock looks when it
// will have.
func (c *check) expired(since, limit time.Duration) bool {
	if limit <= 0 || limit > math.MaxInt64-since {
		return false
	}
	if c.now >= since+limit {
		return true
	}
	c.due = min(c.due, since+limit)
	return false
}

// inactive warns once when no byte has passed for too long, and reports whether
// the grace after that is over too.
func (c *check) inactive() bool {
	t := c.t
	limit := c.set.inactivity()
	last, _ := t.rec.LastData()
	if !c.expired(last, limit) {
		t.warnedAt = 0
		return false
	}
	if t.warnedAt == 0 || last > t.warnedAt {
		t.warnedAt = c.now
		c.warn, c.idle = true, c.now-last
	}
	grace := c.set.InactivityGrace
	grace += time.Duration(t.jitter * float64(grace))
	if c.now >= t.warnedAt+grace {
		return true
	}
	c.due = min(c.due, t.warnedAt+grace, c.now+limit) // another period may begin
	return false
}

// unread looks at the leg that p reads, unless it does: for as long as the other
// leg has no room for more, or when the leg has ended. A peer that breaks off is
// found, and one that ends: its half-open time has begun though nobody has
// read its end yet.
func (c *check) unread(p *pump) {
	t, l := c.t, p.from
	if l.broken != 0 && c.expired(l.broken, answerTimeout) {
		c.broke(l, registry.Reset)
		return
	}
	waits := p.waiting.Load() != 0
	if !waits && !l.finished {
		return
	}
	c.due = min(c.due, c.now+activePeriod)
	info, known := l.ask()
	switch {
	case !known:
	case info.Reset:
		c.broke(l, reasonOf(pendingError(l.conn)))
	case info.Finished && t.eofAt == 0:
		t.eofAt = c.now
		c.halfOpen = true
	}
}

func (c *check) broke(l *leg, why registry.Reason) {
	l.gone = true
	if c.end.Reason == "" {
		c.end.Reason = why
	}
}
