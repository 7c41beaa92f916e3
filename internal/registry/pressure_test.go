// This file tests how ending connections make room for new ones.

package registry

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// noticed keeps what the registry notices.
type noticed struct {
	mu    sync.Mutex
	lines []string
}

func (n *noticed) add(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lines = append(n.lines, fmt.Sprintf(format, args...))
}

func (n *noticed) Pressure(on bool, conns, limit int) {
	n.add("pressure %t at %d of %d", on, conns, limit)
}
func (n *noticed) LongLived(v View) { n.add("old %s", v.ID) }
func (n *noticed) Forgotten(v View, removed bool) {
	n.add("forgotten %s %s %t", v.ID, v.State, removed)
}

// want wants these lines, and forgets them.
func (n *noticed) want(t *testing.T, lines ...string) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !slices.Equal(n.lines, lines) {
		t.Errorf("noticed: got %q, want %q", n.lines, lines)
	}
	n.lines = nil
}

// watched is a registry with a limit, whose notices are kept.
func watched(limit, percent int) (*Registry, *Route, *noticed) {
	r, n := New(), new(noticed)
	r.SetLimits(Limits{Connections: new(limit)}, 0)
	r.SetWatch(Watch{Pressure: percent, Notices: n})
	return r, r.Retain(Passthrough, "a"), n
}

// The one that is closing for longest is cut first, each once, then the one that is
// half open for longest is closed. Live ones stay, whatever comes.
func TestPressureEndsWhatEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, route, _ := watched(10, 50)
		owners := make(map[string]*owner)
		make := func(name string, state State) {
			o := new(owner)
			c := opened(t, r, route, o, "app:443")
			owners[name] = o
			switch state {
			case HalfOpen:
				c.HalfClose()
			case Closing:
				c.Close(Ending{Reason: EOF})
			case Held:
				c.Hold()
			case Migrating:
				c.Migrate()
			default:
			}
			time.Sleep(time.Second)
		}
		make("open", Open)
		make("held", Held)
		make("half open", HalfOpen)
		make("closing", Closing)
		wantEnded := func(after string, want map[string][2]int) {
			t.Helper()
			for name, o := range owners {
				ends, aborts, _ := o.counts()
				if got := [2]int{ends, aborts}; got != want[name] {
					t.Errorf("%s: %s was ended and cut %v times, want %v", after, name, got, want[name])
				}
			}
		}
		wantEnded("below the mark", map[string][2]int{"closing": {1, 0}})
		make("migrating", Migrating) // the fifth arrives below the mark, which is five
		wantEnded("at the mark", map[string][2]int{"closing": {1, 0}})
		make("second half open", HalfOpen)
		wantEnded("first", map[string][2]int{"closing": {1, 1}})
		make("second", Open)
		wantEnded("second", map[string][2]int{"closing": {1, 1}, "half open": {1, 0}})
		make("third", Open)
		wantEnded("third", map[string][2]int{"closing": {1, 1}, "half open": {1, 1}})
		make("fourth", Open)
		want := map[string][2]int{"closing": {1, 1}, "half open": {1, 1}, "second half open": {1, 0}}
		wantEnded("fourth", want)
		make("fifth", Open)
		want["second half open"] = [2]int{1, 1}
		wantEnded("fifth", want)
		if _, err := r.Admit(route, Info{}, new(owner)); err == nil {
			t.Error("got the eleventh admitted, want it refused: nothing of the others is gone yet")
		}
		wantEnded("full", want) // there is nobody left but the living
		for _, v := range views(r) {
			if v.Reason != "" && v.Reason != EOF && v.Reason != Pressure {
				t.Errorf("%s: got reason %q", v.ID, v.Reason)
			}
		}
	})
}

// A refused arrival makes room for the next one.
func TestPressureAtTheLimit(t *testing.T) {
	r, route, _ := watched(2, 90)
	o := &owner{}
	dying := opened(t, r, route, o, "app:443")
	opened(t, r, route, new(owner), "app:443")
	dying.HalfClose()
	if _, err := r.Admit(route, Info{}, new(owner)); err == nil {
		t.Fatal("got the third admitted")
	}
	if ends := o.ended(); len(ends) != 1 || ends[0].Reason != Pressure {
		t.Fatalf("got ends %v, want one by pressure", ends)
	}
	dying.Done()
	if _, err := r.Admit(route, Info{}, new(owner)); err != nil {
		t.Error(err)
	}
}

// Who has reached a limit of its own makes nobody end.
func TestPressureIsNotForTheRefused(t *testing.T) {
	r, route, _ := watched(10, 10)
	o := new(owner)
	opened(t, r, route, o, "app:443").HalfClose()
	r.SetLimits(Limits{Connections: new(10), PerIP: new(1)}, 0)
	full := r.Retain(Passthrough, "full")
	full.SetLimits(Limits{Connections: new(1), PerIP: new(0)})
	opened(t, r, full, new(owner), "app:443")
	ends, aborts, _ := o.counts()
	for _, to := range []*Route{route, full} {
		if _, err := r.Admit(to, Info{Client: "192.0.2.1"}, new(owner)); err == nil {
			t.Fatal("got it admitted")
		}
	}
	if nowEnds, nowAborts, _ := o.counts(); nowEnds != ends || nowAborts != aborts {
		t.Errorf("got %d ended and %d cut for those who were refused, want none", nowEnds-ends, nowAborts-aborts)
	}
}

// Connections of a route that lifts the limit neither bring pressure nor give way.
func TestPressureIsOfWhatCounts(t *testing.T) {
	r, route, n := watched(2, 50)
	free := r.Retain(Passthrough, "free")
	free.SetLimits(Limits{Connections: new(0)})
	o := new(owner)
	opened(t, r, free, o, "app:443").HalfClose()
	opened(t, r, free, new(owner), "app:443")
	n.want(t)
	opened(t, r, route, new(owner), "app:443")
	n.want(t, "pressure true at 1 of 2")
	opened(t, r, route, new(owner), "app:443")
	opened(t, r, free, new(owner), "app:443")
	if ends := o.ended(); len(ends) != 0 {
		t.Errorf("got %v, want the one that does not count left alone", ends)
	}
	free.SetLimits(Limits{})
	n.want(t)
	if _, err := r.Admit(route, Info{}, new(owner)); err == nil {
		t.Fatal("got one more admitted")
	}
	if ends := o.ended(); len(ends) != 1 {
		t.Errorf("got %v, want it ended: it counts now", ends)
	}
}

// Pressure is told of when it begins and when it is over, 5 points below; a change of
// the limit counts.
func TestPressureIsToldOnce(t *testing.T) {
	r, route, n := watched(100, 90)
	var conns []*Conn
	grow := func(to int) {
		for len(conns) < to {
			conns = append(conns, opened(t, r, route, new(owner), "app:443"))
		}
		for len(conns) > to {
			finish(conns[0], EOF)
			conns = conns[1:]
		}
	}
	grow(89)
	n.want(t)
	grow(90)
	n.want(t, "pressure true at 90 of 100")
	grow(100)
	grow(85)
	grow(95)
	n.want(t)
	grow(84)
	n.want(t, "pressure false at 84 of 100")
	grow(89)
	n.want(t)
	grow(91)
	n.want(t, "pressure true at 90 of 100")
	r.SetLimits(Limits{Connections: new(1000)}, 0)
	n.want(t, "pressure false at 91 of 1000")
	r.SetWatch(Watch{Pressure: 9, Notices: n})
	n.want(t, "pressure true at 91 of 1000")
	r.SetLimits(Limits{}, 0)
	n.want(t, "pressure false at 91 of 0")
	grow(0)
	n.want(t)
}

// views are all connections.
func views(r *Registry) []View {
	page, _ := r.List(Filter{}, 1<<30, "")
	return page
}
