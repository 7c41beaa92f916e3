// This file is what the model of limits knows of pressure: who has to give way to whom,
// and when that is told.

package registry

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// pressed is the part of the reference that knows who is ending, in which order, by
// lists that are searched at every arrival.
type pressed struct {
	percent           int
	on                bool
	closing, halfOpen []*life // the longest in its state first; those cut are not in it
	noticed           noticed
	told              int // notices, so far
	cuts, closed      int // by pressure
}

// life is what the reference knows of a connection's life, and who really owns it.
type life struct {
	owner  owner
	route  string
	state  State
	ends   []Reason
	aborts int
}

// goesOn changes a connection's state at random, if that is legal.
func (ref *reference) goesOn(rng *rand.Rand, c counted) {
	l := c.life
	l.route = c.route
	may := func(s State, ok bool) {
		if ok {
			l.state = s
		}
	}
	switch rng.IntN(6) {
	case 0:
		may(Open, c.rec.Open(""))
	case 1:
		may(Held, c.rec.Hold())
	case 2:
		may(Migrating, c.rec.Migrate())
	case 3, 4:
		if c.rec.HalfClose() {
			l.state = HalfOpen
			ref.halfOpen = append(ref.halfOpen, l)
		}
	case 5:
		if c.rec.Close(Ending{Reason: Admin}) {
			ref.ends(l, Admin)
		}
	}
}

// ends notes that a connection's end has begun.
func (p *pressed) ends(l *life, why Reason) {
	p.leaves(l)
	l.state = Closing
	l.ends = append(l.ends, why)
	p.closing = append(p.closing, l)
}

// leaves takes a connection out of the lists.
func (p *pressed) leaves(l *life) {
	is := func(other *life) bool { return other == l }
	p.closing, p.halfOpen = slices.DeleteFunc(p.closing, is), slices.DeleteFunc(p.halfOpen, is)
}

// arrives notes who has to give way to a connection that arrives at a route.
func (ref *reference) arrives(route string) {
	if ref.routes[route] == nil || isOff(ref.own[route].Connections) || !ref.reaches(ref.percent) {
		return
	}
	counts := func(l *life) bool { return !isOff(ref.own[l.route].Connections) }
	if i := slices.IndexFunc(ref.closing, counts); i >= 0 {
		ref.closing[i].aborts++
		ref.leaves(ref.closing[i])
		ref.cuts++
	} else if i := slices.IndexFunc(ref.halfOpen, counts); i >= 0 {
		ref.ends(ref.halfOpen[i], Pressure)
		ref.closed++
	}
}

// reaches reports whether the connections that count are so many percent of the limit.
func (ref *reference) reaches(percent int) bool {
	n := ref.total(func(c counted) bool { return !isOff(ref.own[c.route].Connections) })
	limit := orZero(ref.all.Connections)
	return percent > 0 && limit > 0 && float64(n)/float64(limit) >= float64(percent)/100
}

// comparePressure holds what each owner was told, and what was noticed, against the
// reference. Live connections were told nothing.
func (ref *reference) comparePressure(t *testing.T, at string) {
	t.Helper()
	for _, c := range ref.conns {
		var ends []Reason
		for _, e := range c.life.owner.ended() {
			ends = append(ends, e.Reason)
		}
		_, aborts, _ := c.life.owner.counts()
		if c.rec.State() != c.life.state || !slices.Equal(ends, c.life.ends) || aborts != c.life.aborts {
			t.Fatalf("%s: got a connection %v, told %v and cut %d times; want it %v, told %v and cut %d times",
				at, c.rec.State(), ends, aborts, c.life.state, c.life.ends, c.life.aborts)
		}
	}
	if on := ref.reaches(ref.percent) || ref.on && ref.reaches(max(ref.percent-5, 1)); on != ref.on {
		ref.on = on
		ref.told++
		n := ref.total(func(c counted) bool { return !isOff(ref.own[c.route].Connections) })
		ref.noticed.want(t, fmt.Sprintf("pressure %t at %d of %d", on, n, orZero(ref.all.Connections)))
	} else {
		ref.noticed.want(t)
	}
	if t.Failed() {
		t.Fatal(at)
	}
}
