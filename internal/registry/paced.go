// This file ends and moves many connections, spread over time, so that neither their
// clients nor the backends meet all of them at once.

package registry

import (
	"math/rand/v2"
	"time"
)

// EndPaced ends the connections of a route evenly within window, in random
// order and with the last one due when it ends, so that their clients do not
// all return at once.
func (r *Registry) EndPaced(route *Route, window time.Duration, e Ending) int {
	now := time.Now()
	conns := r.live(&route.byAge)
	paced(conns, now, window, func(c *Conn, at time.Time) { c.closeBy(at, e) })
	return len(conns)
}

// EndSelected ends the connections that f selects, spread like those of EndPaced, and
// returns how many it has selected. No reload keeps them.
func (r *Registry) EndSelected(f Filter, window time.Duration, e Ending) int {
	var conns []*Conn
	now := time.Now()
	r.survey(&r.byAge, "", func(c *Conn) bool {
		if f.selects(c, now) {
			conns = append(conns, c)
		}
		return true
	})
	if window == 0 {
		for _, c := range conns {
			c.Close(e)
		}
		return len(conns)
	}
	paced(conns, now, window, func(c *Conn, at time.Time) { c.closeBy(at, e) })
	return len(conns)
}

// MovePaced plans for the connections of a route that use an upstream which
// leaves to move to another one, spread like those of EndPaced, and lifts
// such plans for all others. Those that found no other when their time came are
// spread again, lest they all go at once when there is one; and so are those that
// were first to see that they have to go, and made plans of their own. It returns how
// many are to move.
func (r *Registry) MovePaced(route *Route, leaves func(upstream string) bool, window time.Duration) int {
	type seat struct {
		c                  *Conn
		upstream           string
		planned, needsPlan bool
	}
	var taken []seat
	now := time.Now()
	r.survey(&route.byAge, "", func(c *Conn) bool {
		if s := (seat{c, c.upstreamKey(), !c.moveAt.IsZero(), c.needsPlan(now)}); s.upstream != "" || s.planned {
			taken = append(taken, s)
		}
		return true
	})
	left := make(map[string]bool)
	var leaving []seat
	for _, s := range taken {
		goes, known := left[s.upstream]
		if !known {
			goes = s.upstream != "" && leaves(s.upstream)
			left[s.upstream] = goes
		}
		switch {
		case goes && s.needsPlan:
			leaving = append(leaving, s)
		case !goes && s.planned:
			s.c.moveFrom(s.upstream, time.Time{})
		}
	}
	paced(leaving, now, window, func(s seat, at time.Time) { s.c.moveFrom(s.upstream, at) })
	return len(leaving)
}

// closeBy plans the connection's end. Of two plans the sooner time holds, and its reason;
// but what an admin has asked for stays that: no reload lifts it. Another upstream does not
// put it off.
func (c *Conn) closeBy(at time.Time, e Ending) {
	c.reg.mu.Lock()
	if planned, why := c.closeAt, c.closeWhy; !planned.IsZero() {
		keep := !at.Before(planned)
		if byAdmin := why.Reason == Admin; byAdmin != (e.Reason == Admin) {
			keep = byAdmin
		}
		if keep {
			e = why
		}
		if planned.Before(at) {
			at = planned
		}
	}
	c.planEnd(at, e, false)
	owner := c.owner
	c.reg.mu.Unlock()
	owner.Reconsider()
}

// liftEnd lifts a planned end, unless it has become another one.
func (c *Conn) liftEnd(planned Ending) {
	c.reg.mu.Lock()
	if c.closeWhy == planned {
		c.planEnd(time.Time{}, Ending{}, false)
	}
	owner := c.owner
	c.reg.mu.Unlock()
	owner.Reconsider()
}

// paced gives each connection a time within the window that began at a time, evenly, in
// random order, the last one when it ends.
func paced[C any](conns []C, began time.Time, window time.Duration, plan func(c C, at time.Time)) {
	rand.Shuffle(len(conns), func(i, j int) { conns[i], conns[j] = conns[j], conns[i] })
	w := begin()
	for i, c := range conns {
		if i%100 == 0 {
			w.rest()
		}
		share := float64(i+1) / float64(len(conns)) // a product of integers could overflow
		plan(c, began.Add(time.Duration(share*float64(window))))
	}
}

// EndLeaving ends the connections of a route that use an upstream which leaves, for
// the reason that leaves gives, spread like those of EndPaced. Those whose end is
// planned keep that plan, but for one whose upstream was Unhealthy and is to be
// left no more. It returns how many were added.
func (r *Registry) EndLeaving(route *Route, leaves func(upstream string) Reason, window time.Duration) int {
	type seat struct {
		c        *Conn
		upstream string
		why      Ending
	}
	now := time.Now()
	var leaving []seat
	for _, c := range r.live(&route.byAge) {
		var reason Reason
		up := c.Upstream()
		if up != "" {
			reason = leaves(up)
		}
		at, planned := c.PlannedEnd()
		switch {
		case reason != "" && at.IsZero():
			leaving = append(leaving, seat{c, up, Ending{Reason: reason}})
		case reason == "" && !at.IsZero() && planned.Reason == Unhealthy:
			c.liftEnd(planned)
		}
	}
	paced(leaving, now, window, func(s seat, at time.Time) { s.c.leaveAt(s.upstream, at, s.why) })
	return len(leaving)
}

// KeepAll lifts what EndPaced and EndLeaving planned for connections of a route
// that may stay at their upstream.
func (r *Registry) KeepAll(route *Route, stays func(upstream string) bool) {
	for _, c := range r.live(&route.byAge) {
		if at, planned := c.PlannedEnd(); !at.IsZero() && planned.Reason != Admin && stays(c.Upstream()) {
			c.liftEnd(planned)
		}
	}
}

// ReconsiderAll tells the owners of a route's connections that its settings
// have changed.
func (r *Registry) ReconsiderAll(route *Route) {
	for _, c := range r.live(&route.byAge) {
		c.reg.mu.Lock()
		owner := c.owner
		c.reg.mu.Unlock()
		owner.Reconsider()
	}
}
