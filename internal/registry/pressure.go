// This file makes room when the registry's limit comes near: connections that are
// ending anyway go first, and no live one.

package registry

import "container/list"

// relief is how far below its mark, in percent of the limit, pressure is over.
const relief = 5

// pressure is the state of the registry's soft limit. Registry.mu guards it.
type pressure struct {
	percent int // of limits.connections; 0: no such mark
	on      bool

	// The connections that end, the longest in its state first, unless they have
	// been cut.
	closing, halfOpen list.List
}

// of returns where connections in a state stand in line, or nil.
func (p *pressure) of(s State) *list.List {
	switch s {
	case Closing:
		return &p.closing
	case HalfOpen:
		return &p.halfOpen
	default:
		return nil
	}
}

// lineUp keeps the order of those that end. Registry.mu is held.
func (c *Conn) lineUp(from, to State) {
	p := &c.reg.pressure
	if c.inLine != nil {
		p.of(from).Remove(c.inLine)
		c.inLine = nil
	}
	if line := p.of(to); line != nil {
		c.inLine = line.PushBack(c)
	}
}

// reached reports whether the registry has percent of the connections that it may
// have. mu is held.
func (r *Registry) reached(percent int) bool {
	return percent > 0 && r.limits.connections > 0 && 100*r.counted >= percent*r.limits.connections
}

// feel tells when pressure begins and when it is over. It follows every change of
// what counts towards the limit. mu is held.
func (r *Registry) feel() {
	p := &r.pressure
	switch {
	case !p.on && r.reached(p.percent):
		p.on = true
	case p.on && !r.reached(max(p.percent-relief, 1)):
		p.on = false
	default:
		return
	}
	if n := r.watch.Notices; n != nil {
		on, conns, limit := p.on, r.counted, r.limits.connections
		r.after = append(r.after, func() { n.Pressure(on, conns, limit) })
	}
}

// makeRoom ends one of the connections that count towards the registry's limit, if a
// new one that does arrives under pressure: it cuts the one that is closing for
// longest, else closes the one that is half open for longest. mu is held.
func (r *Registry) makeRoom(t *Route) {
	if t.lifts.connections || !r.reached(r.pressure.percent) {
		return
	}
	if c := first(&r.pressure.closing); c != nil {
		r.pressure.closing.Remove(c.inLine)
		c.inLine = nil
		r.after = append(r.after, c.owner.Abort)
	} else if c := first(&r.pressure.halfOpen); c != nil {
		c.close(Ending{Reason: Pressure})
	}
}

// first returns the first connection in line that counts towards the registry's
// limit, or nil.
func first(line *list.List) *Conn {
	for e := line.Front(); e != nil; e = e.Next() {
		if c := e.Value.(*Conn); !c.route.lifts.connections {
			return c
		}
	}
	return nil
}
