// This file looks at all records now and then, for what nobody else would notice.

package registry

import "time"

const (
	// sweepPeriod is the time between two sweeps, unless long_lived is shorter.
	sweepPeriod = 5 * time.Second
	// lateAfter is how long after its deadline a record is taken for forgotten:
	// owners keep their deadlines themselves, and may be late on a busy machine.
	lateAfter = 10 * time.Second
)

// Watch is what is to be noticed about connections that nobody asks for.
type Watch struct {
	// Pressure is the percentage of the limit on all connections at which those that
	// end are ended at once to make room; 0: never.
	Pressure int
	// LongLived is the age at which a connection is told of; 0: never.
	LongLived time.Duration
	// Notices is told of what is noticed. nil: nobody.
	Notices Notices
}

// Notices is told of what the registry notices. Its methods are called without locks.
type Notices interface {
	// Pressure begins, or is over, at a number of connections that count towards
	// the limit.
	Pressure(on bool, conns, limit int)
	// LongLived is called once for a connection that has got old.
	LongLived(v View)
	// Forgotten is called for a record whose owner should have ended it long ago. It
	// is cut first, and removed if that does not help.
	Forgotten(v View, removed bool)
}

// SetWatch says what is to be noticed, and starts the sweeps, which go on until the
// process ends.
func (r *Registry) SetWatch(w Watch) {
	r.mu.Lock()
	defer r.unlock()
	was := r.watch.period()
	r.watch, r.pressure.percent = w, w.Pressure
	r.feel()
	if r.sweeper == nil {
		r.sweeper = time.AfterFunc(w.period(), r.sweepOn)
	} else if w.period() != was { // reloads that come often do not put it off
		r.sweeper.Reset(w.period())
	}
}

func (w Watch) period() time.Duration {
	if w.LongLived > 0 {
		return min(w.LongLived, sweepPeriod)
	}
	return sweepPeriod
}

// sweepOn sweeps and plans the next sweep.
func (r *Registry) sweepOn() {
	r.Sweep()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sweeper.Reset(r.watch.period())
}

// Sweep looks at all records once. What it removes is counted in
// sweeper_found_total, which is zero unless there is a bug.
func (r *Registry) Sweep() {
	began := time.Now()
	r.survey(&r.byAge, "", func(c *Conn) bool {
		c.sweep(began)
		return true
	})
	r.metrics.swept(time.Since(began))
}

// sweep looks at one record. Registry.mu is held, by scan.
func (c *Conn) sweep(now time.Time) {
	r, notices := c.reg, c.reg.watch.Notices
	tell := func(do func(n Notices, v View)) {
		if notices != nil {
			v := c.view(now)
			r.after = append(r.after, func() { do(notices, v) })
		}
	}
	if old := r.watch.LongLived; old > 0 && !c.old && now.Sub(c.opened()) >= old {
		c.old = true
		tell(Notices.LongLived)
	}
	if c.deadline.IsZero() || now.Sub(c.deadline) < lateAfter {
		return
	}
	removed := c.forgotten
	tell(func(n Notices, v View) { n.Forgotten(v, removed) })
	if !removed {
		c.forgotten = true
		r.metrics.found()
		owner := c.owner
		r.after = append(r.after, func() { abort(owner) })
		return
	}
	c.done()
}

// abort cuts a connection whose owner may be in any condition.
func abort(o Owner) {
	defer func() { _ = recover() }() // one broken record does not stop the sweeps
	o.Abort()
}
