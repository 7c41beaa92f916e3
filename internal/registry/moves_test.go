// This file tests how many connections are moved together: paced, and only those
// whose upstream leaves.

package registry

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// leaves is what MovePaced is told when one upstream leaves.
func leaves(name string) func(string) bool {
	return func(upstream string) bool { return upstream == name }
}

func TestMovePacedSpreadsEvenly(t *testing.T) {
	for _, test := range []struct {
		name   string
		count  int
		window time.Duration
	}{
		{"none", 0, time.Second},
		{"one", 1, 10 * time.Second},
		{"some", 10, 10 * time.Second},
		{"many", 1000, 10 * time.Second},
		{"more than nanoseconds", 100, 50},
		{"at once", 50, 0},
		{"over months", 1200, 100 * 24 * time.Hour},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := New()
				route, other := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
				var all []*Conn
				var owners []*owner
				for range test.count {
					o := new(owner)
					all, owners = append(all, opened(t, r, route, o, "old:80")), append(owners, o)
				}
				stays, elsewhere := new(owner), new(owner)
				kept := opened(t, r, route, stays, "new:80")
				same := opened(t, r, other, elsewhere, "old:80")
				began := time.Now()
				if n := r.MovePaced(route, leaves("old:80"), test.window); n != test.count {
					t.Errorf("got %d to move, want %d", n, test.count)
				}
				var due []time.Duration
				for i, c := range all {
					due = append(due, c.PlannedMove().Sub(began))
					if _, _, told := owners[i].counts(); told != 1 {
						t.Fatalf("got an owner told %d times, want once", told)
					}
				}
				inOrder := slices.IsSorted(due)
				slices.Sort(due)
				for i, d := range due {
					want := time.Duration(float64(test.window) * float64(i+1) / float64(test.count))
					if diff := d - want; diff < -time.Millisecond || diff > time.Millisecond {
						t.Fatalf("got connection %d of %d due in %v, want in %v", i+1, test.count, d, want)
					}
				}
				if test.count > 0 && due[test.count-1] != test.window {
					t.Errorf("got the last one due in %v, want in %v", due[test.count-1], test.window)
				}
				if test.count >= 10 && test.window > time.Second && inOrder {
					t.Error("got the oldest moved first, want a random order")
				}
				_, _, a := stays.counts()
				_, _, b := elsewhere.counts()
				if !kept.PlannedMove().IsZero() || !same.PlannedMove().IsZero() || a != 0 || b != 0 {
					t.Error("got a plan for a connection of an upstream that stays, or of another route")
				}
			})
		})
	}
}

// Who sees first that it has to go, and plans for itself, is spread with the others; once
// its own time has come, or a plan was made for it, that holds.
func TestMovePacedAfterOwnPlans(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(WebSocket, "a")
		var all []*Conn
		for range 10 {
			c := opened(t, r, route, new(owner), "old:80")
			c.PlanMove(time.Now().Add(time.Second))
			all = append(all, c)
		}
		due := opened(t, r, route, new(owner), "old:80")
		at := due.PlanMove(time.Now())
		if n := r.MovePaced(route, leaves("old:80"), 10*time.Second); n != len(all) {
			t.Errorf("got %d to move, want all %d but the one that moves already", n, len(all))
		}
		if !due.PlannedMove().Equal(at) {
			t.Errorf("got the one that moves already planned for %v, want %v", due.PlannedMove(), at)
		}
		spread := make(map[time.Time]bool)
		for _, c := range all {
			spread[c.PlannedMove()] = true
		}
		if len(spread) != len(all) {
			t.Errorf("got %d times for %d connections, want them spread", len(spread), len(all))
		}
		for _, c := range all {
			if before := c.PlannedMove(); !c.PlanMove(time.Now()).Equal(before) {
				t.Error("got a plan replaced by the owner's own")
			}
		}
		if n := r.MovePaced(route, leaves("old:80"), 10*time.Second); n != 0 {
			t.Errorf("again: got %d to move, want none", n)
		}
	})
}

// A second reload leaves what is planned as it is, spreads those who have come since,
// and lifts what is not needed any more.
func TestMovePacedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(WebSocket, "a")
		first, second := new(owner), new(owner)
		a, b := opened(t, r, route, first, "a:80"), opened(t, r, route, second, "b:80")
		r.MovePaced(route, leaves("a:80"), 10*time.Second)
		at := a.PlannedMove()
		time.Sleep(4 * time.Second)
		late := opened(t, r, route, new(owner), "a:80")
		if n := r.MovePaced(route, leaves("a:80"), 2*time.Second); n != 1 {
			t.Errorf("got %d to move, want the one that is new", n)
		}
		if !a.PlannedMove().Equal(at) || !late.PlannedMove().Equal(time.Now().Add(2*time.Second)) {
			t.Errorf("got %v and %v planned, want the first one as it was, and the new one in 2s", a.PlannedMove(), late.PlannedMove())
		}
		if _, _, told := first.counts(); told != 1 {
			t.Errorf("got the owner told %d times, want once", told)
		}

		// Now the other one leaves.
		if n := r.MovePaced(route, leaves("b:80"), 6*time.Second); n != 1 {
			t.Errorf("got %d to move, want the one of the other upstream", n)
		}
		if !a.PlannedMove().IsZero() || !late.PlannedMove().IsZero() || !b.PlannedMove().Equal(time.Now().Add(6*time.Second)) {
			t.Errorf("got %v, %v and %v planned, want only the last one, in 6s", a.PlannedMove(), late.PlannedMove(), b.PlannedMove())
		}
		_, _, told := first.counts()
		_, _, other := second.counts()
		if told != 2 || other != 1 {
			t.Errorf("got the owners told %d and %d times, want the first of plan and lifting, the other of its plan", told, other)
		}
		if n := r.MovePaced(route, leaves("none"), time.Second); n != 0 || !b.PlannedMove().IsZero() {
			t.Errorf("got %d to move, %v planned, want nothing when nobody leaves", n, b.PlannedMove())
		}
	})
}

// Moves that found no other upstream are spread anew when one may have come, and not
// all due at once. Those that are under way, or just due, are left alone.
func TestMovePacedAfterFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(WebSocket, "a")
		var stuck []*Conn
		for range 10 {
			stuck = append(stuck, opened(t, r, route, new(owner), "old:80"))
		}
		moving := opened(t, r, route, new(owner), "old:80")
		r.MovePaced(route, leaves("old:80"), 0)
		moving.Migrate()
		time.Sleep(time.Minute)
		due := opened(t, r, route, new(owner), "old:80")
		due.MoveAt(time.Now())
		if n := r.MovePaced(route, leaves("old:80"), 10*time.Second); n != len(stuck) {
			t.Errorf("got %d to move, want the %d that did not get away", n, len(stuck))
		}
		at := make(map[time.Duration]bool)
		for _, c := range stuck {
			at[time.Until(c.PlannedMove())] = true
		}
		for i := range stuck {
			if want := time.Duration(i+1) * time.Second; !at[want] {
				t.Errorf("got moves in %v, want one in %v", at, want)
			}
		}
		if !due.PlannedMove().Equal(time.Now()) || moving.PlannedMove().After(time.Now()) {
			t.Errorf("got a move that is due planned in %v, and one under way in %v", time.Until(due.PlannedMove()), time.Until(moving.PlannedMove()))
		}
	})
}

// Whoever is between two backends, or is not yet or no more at one, is not concerned:
// what it does next follows the newest config.
func TestMovePacedInEveryState(t *testing.T) {
	for s := range stateCount {
		r := New()
		route := r.Retain(WebSocket, "a")
		c := began(t, r, route, s)
		n := r.MovePaced(route, leaves("app:80"), time.Minute)
		want := 0
		switch s {
		case Connecting, Open, Migrating, HalfOpen, Closing: // they have a place there
			want = 1
		default: // Held, Closed: nowhere
		}
		if n != want || c.PlannedMove().IsZero() != (want == 0) {
			t.Errorf("%v: got %d to move, %v planned, want %d", s, n, c.PlannedMove(), want)
		}
		if c.State() != s {
			t.Errorf("%v: got state %v", s, c.State())
		}
	}
}

// A plan is for the upstream that leaves. It is void for a connection that came
// elsewhere: one that is still dialed, and gets its answer from another upstream.
func TestPlanOfAnUpstreamThatRefused(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	c := admit(t, r, route, new(owner))
	c.Attempt(choose(route, "old:80"), "old:80", time.Time{})
	r.MovePaced(route, leaves("old:80"), time.Minute)
	c.Attempt(choose(route, "new:80"), "new:80", time.Time{})
	open(c, new(owner), "")
	if at := c.PlannedMove(); !at.IsZero() {
		t.Errorf("got a connection of an upstream that stays to be moved in %v, want no plan", time.Until(at).Round(time.Second))
	}
}

// … or one that is moved by others while MovePaced looks and plans.
func TestPlanOfOneThatMovesMeanwhile(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	var all []*Conn
	var once bool
	o := &onReconsider{do: func() {
		if once {
			return
		}
		once = true // the first one was planned: the other moves, by an admin's request
		for _, c := range all {
			if c.PlannedMove().IsZero() && c.Migrate() {
				c.TakeOver(choose(route, "new:80"), "new:80", 0)
			}
		}
	}}
	for range 2 {
		all = append(all, opened(t, r, route, o, "old:80"))
	}
	r.MovePaced(route, leaves("old:80"), time.Minute)
	for _, c := range all {
		if planned := !c.PlannedMove().IsZero(); planned != (c.Upstream() == "old:80") {
			t.Errorf("got a connection on %s planned to move: %t", c.Upstream(), planned)
		}
	}
}

// onReconsider is an owner that does something when it is told of a plan.
type onReconsider struct {
	owner
	do func()
}

func (o *onReconsider) Reconsider() { o.do() }
