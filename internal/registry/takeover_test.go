// This file tests what happens to a record between two backends.

package registry

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"
)

// began makes a record that is in a state, with a place at app:80 as far as
// connections in that state have one.
func began(t *testing.T, r *Registry, route *Route, s State) *Conn {
	t.Helper()
	c := admit(t, r, route, new(owner))
	c.Attempt(choose(route, "app:80"), "10.1.1.1:80", time.Time{})
	force(t, c, s)
	return c
}

// places checks how many places are taken at app:80 and at app:81.
func places(t *testing.T, route *Route, old, other int) {
	t.Helper()
	if a, b := placed(route, "app:80"), placed(route, "app:81"); a != old || b != other {
		t.Errorf("places: got %d at app:80 and %d at app:81, want %d and %d", a, b, old, other)
	}
}

func TestBetweenBackendsFromEveryState(t *testing.T) {
	const self = stateCount // it stays what it is
	for _, test := range []struct {
		name string
		do   func(c *Conn) bool
		to   map[State]State
	}{
		{"Hold", (*Conn).Hold, map[State]State{Open: Held, Migrating: Held, Held: self}},
		{"Migrate", (*Conn).Migrate, map[State]State{Open: Migrating}},
		{"Stay", func(c *Conn) bool { c.Stay(); return c.State() == Open }, map[State]State{Migrating: Open, Open: self}},
		{"TakeOver", func(c *Conn) bool {
			up := choose(c.route, "app:81")
			if c.TakeOver(up, "10.1.1.2:80", 3) {
				return true
			}
			c.route.Leave(up) // it is the caller's still
			return false
		}, map[State]State{Held: Open, Migrating: Open}},
	} {
		for from := range stateCount {
			if from == Connecting && test.name == "TakeOver" {
				continue // there is nothing to take over, and nobody who would
			}
			t.Run(fmt.Sprintf("%s of %v", test.name, from), func(t *testing.T) {
				r := New()
				route := r.Retain(WebSocket, "a")
				c := began(t, r, route, from)
				since := c.since
				want, ok := test.to[from]
				if got := test.do(c); got != ok {
					t.Errorf("got %t, want %t", got, ok)
				}
				if !ok || want == self {
					want = from
					if c.since != since {
						t.Error("got the time in the state begun anew, want it to go on")
					}
				}
				if got := c.State(); got != want {
					t.Errorf("got state %v, want %v", got, want)
				}
				switch {
				case test.name == "TakeOver" && ok:
					places(t, route, 0, 1)
					v := c.View()
					if v.Upstream != "app:81" || v.Dial != "10.1.1.2:80" || v.Resumes != 1 || v.Replayed != 3 {
						t.Errorf("got %+v, want the other upstream, one resume, 3 replayed", v)
					}
				case want == Held || want == Closed:
					places(t, route, 0, 0)
				default:
					places(t, route, 1, 0)
				}
				if want == Held && (c.Upstream() != "" || c.View().Dial != "" || len(r.Stats().ByUpstream) != 0) {
					t.Errorf("got upstream %q, dial %q while held, want none", c.Upstream(), c.View().Dial)
				}
				finish(c, Admin)
				places(t, route, 0, 0)
				if len(route.upstreams) != 0 {
					t.Error("got an upstream kept that nobody uses")
				}
			})
		}
	}
}

// Taking over on the upstream that was lost keeps what is known of it only if others
// use it; the count is right in either case.
func TestTakeOverOnTheSameUpstream(t *testing.T) {
	for _, from := range []State{Held, Migrating} {
		r := New()
		route := r.Retain(WebSocket, "a")
		c := began(t, r, route, from)
		if !c.TakeOver(choose(route, "app:80"), "10.1.1.9:80", 0) {
			t.Fatal("got false, want it open again")
		}
		places(t, route, 1, 0)
		if v := c.View(); v.Dial != "10.1.1.9:80" || v.Replayed != 0 || v.Resumes != 1 || r.Stats().ByUpstream["app:80"] != 1 {
			t.Errorf("got %+v, want it on the same upstream", v)
		}
		finish(c, Idle)
		places(t, route, 0, 0)
	}
}

func TestResumesAddUp(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	c := began(t, r, route, Open)
	opened := c.View().OpenedAt
	for n := range 5 {
		c.Hold()
		c.TakeOver(choose(route, "app:81"), "", n)
		c.Migrate()
		c.TakeOver(choose(route, "app:80"), "", 0)
	}
	v := c.View()
	if v.Resumes != 10 || v.Replayed != 0+1+2+3+4 {
		t.Errorf("got %d resumes, %d replayed, want 10 and 10", v.Resumes, v.Replayed)
	}
	if !v.OpenedAt.Equal(opened) {
		t.Error("got another opened_at, want that the client's connection is the same")
	}
	if c.SetBuffered(77); c.View().Buffered != 77 {
		t.Errorf("got %d bytes buffered, want 77", c.View().Buffered)
	}
	places(t, route, 1, 0)
}

// A plan is for the upstream that the connection is on: it stays when a move was not
// possible, and goes with the upstream.
func TestPlannedMove(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	o := new(owner)
	c := opened(t, r, route, o, "app:80")
	at := time.Now().Add(time.Minute)
	told := func() int { _, _, n := o.counts(); return n }
	before := told()
	c.MoveAt(at)
	if !c.PlannedMove().Equal(at) || told() != before+1 {
		t.Errorf("got %v planned, owner told %d times, want %v and once", c.PlannedMove(), told()-before, at)
	}
	if got := c.PlanMove(at.Add(time.Second)); !got.Equal(at) || !c.PlannedMove().Equal(at) {
		t.Errorf("got %v planned by the owner, want the plan that there was", got)
	}
	c.Migrate()
	c.Stay()
	if c.PlannedMove().IsZero() {
		t.Error("got the plan forgotten after a move that was not possible")
	}
	c.Migrate()
	c.TakeOver(choose(route, "app:81"), "", 0)
	if !c.PlannedMove().IsZero() {
		t.Error("got a move planned for a connection that has just moved")
	}
	c.MoveAt(at)
	c.Hold()
	if !c.PlannedMove().IsZero() {
		t.Error("got a move planned away from an upstream that was lost")
	}
	c.TakeOver(choose(route, "app:81"), "", 0)
	c.MoveAt(at)
	if c.MoveAt(time.Time{}); !c.PlannedMove().IsZero() || told() != before+4 {
		t.Error("got the plan kept, or the owner not told that it is lifted")
	}
}

// mover is an owner that says whether it may be moved.
type mover struct {
	owner
	err   error
	moves atomic.Int32
}

func (m *mover) Move() error {
	m.moves.Add(1)
	return m.err
}

func TestMoveAsksTheOwner(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	dialing, m := &mover{err: errors.New("not yet")}, new(mover)
	c := admit(t, r, route, dialing)
	if err := c.Move(); err != dialing.err {
		t.Errorf("got %v while it is dialed, want %v", err, dialing.err)
	}
	c.Open("")
	c.Handover(m)
	if err := c.Move(); err != nil || m.moves.Load() != 1 || dialing.moves.Load() != 1 {
		t.Errorf("got %v, session asked %d times, want it asked once", err, m.moves.Load())
	}
}
