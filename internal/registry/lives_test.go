// This file tests whole lives: what ends them in which state, in whatever order things
// happen, and many at once.

package registry

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// C11: each trigger in each state of either kind ends a connection once, which is told
// and counted by the first reason; all that it held is given back once.
func TestEachTriggerInEachState(t *testing.T) {
	for _, kind := range []Kind{WebSocket, Passthrough} {
		for state := range stateCount {
			for i, reason := range allReasons {
				second := allReasons[(i+1)%len(allReasons)]
				name := fmt.Sprintf("%s, %v, %s", kind, state, reason)
				r := New()
				r.SetLimits(Limits{Connections: new(2), PerIP: new(2)}, 0)
				route := r.Retain(kind, "a")
				o := new(owner)
				c, err := r.Admit(route, Info{Kind: kind, Client: "192.0.2.1"}, o)
				if err != nil {
					t.Fatal(err)
				}
				c.Attempt(choose(route, "app:80"), "app:80", time.Time{})
				force(t, c, state)
				c.Handover(o)
				had := len(o.ended())
				ended := state == Closing || state == Closed
				if got := c.Close(Ending{Reason: reason}); got == ended {
					t.Errorf("%s: got Close %t", name, got)
				}
				if c.Close(Ending{Reason: second}) {
					t.Errorf("%s: got a second winner", name)
				}
				want, told := reason, 1
				if ended {
					want, told = Admin, 0 // what force gave
				}
				if got := o.ended(); c.Ending().Reason != want || len(got) != had+told {
					t.Errorf("%s: got reason %s, owner told %v; want %s, %d times", name, c.Ending().Reason, got, want, told)
				}
				c.Done()
				c.Done()
				if r.Len() != 0 || c.State() != Closed || placed(route, "app:80") != 0 {
					t.Errorf("%s: got %d connections, state %v, %d at the upstream; want nothing left", name, r.Len(), c.State(), placed(route, "app:80"))
				}
				opened := state != Connecting && state != Closed
				closed := gathered(t, r)["closed_total "+string(kind)+" "+string(want)+" a"]
				if opened != (closed == 1) || opened != (r.Stats().ClosedByReason[want] == 1) {
					t.Errorf("%s: got %v counted by metrics, %v by stats; want it counted once if it was opened: %t",
						name, closed, r.Stats().ClosedByReason, opened)
				}
				wantNothingCounted(t, r)
			}
		}
	}
}

// C30: whatever happens to connections of either kind, in whatever order, each is in the
// state that a table says, gauges agree at every step, and all end in Closed.
func TestRandomLives(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 31))
		r := New()
		routes := map[Kind]*Route{WebSocket: r.Retain(WebSocket, "a"), Passthrough: r.Retain(Passthrough, "a")}
		type one struct {
			c    *Conn
			want State
		}
		var all []*one
		for range 6 {
			kind := []Kind{WebSocket, Passthrough}[rng.IntN(2)]
			c, err := r.Admit(routes[kind], Info{Kind: kind}, new(owner))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, &one{c: c})
		}
		for step := range 60 {
			x := all[rng.IntN(len(all))]
			// from is where an event leads from; else it must change nothing.
			event := func(did bool, to State, from ...State) {
				legal := false
				for _, s := range from {
					legal = legal || s == x.want
				}
				if did != legal {
					t.Fatalf("seed %d, step %d: got %v to %v %t, want %t", seed, step, x.want, to, did, legal)
				}
				if legal {
					x.want = to
				}
			}
			switch rng.IntN(8) {
			case 0:
				event(x.c.Open(""), Open, Connecting)
			case 1:
				event(x.c.Hold() && x.want != Held, Held, Open, Migrating)
			case 2:
				event(x.c.Migrate(), Migrating, Open)
			case 3:
				x.c.Stay()
				event(x.want == Migrating, Open, Migrating)
			case 4:
				up := choose(x.c.Route(), "b:80")
				took := x.c.TakeOver(up, "b:80", 0)
				if !took {
					x.c.Route().Leave(up)
				}
				event(took, Open, Held, Migrating)
			case 5:
				event(x.c.HalfClose(), HalfOpen, Open)
			case 6:
				if rng.IntN(3) == 0 { // else few live long
					event(x.c.Close(Ending{Reason: Idle}), Closing, Connecting, Open, Held, Migrating, HalfOpen)
				}
			case 7: // owners close before they are done
				if x.want == Closing || x.want == Closed || x.want == Connecting && rng.IntN(3) == 0 {
					x.c.Done()
					x.want = Closed
				}
			}
			got, want := gathered(t, r), map[string]float64{}
			for _, x := range all {
				if s := x.c.State(); s != x.want {
					t.Fatalf("seed %d, step %d: got state %v, want %v", seed, step, s, x.want)
				}
				if x.want != Closed {
					want[fmt.Sprintf("active %s a %v", x.c.info.Kind, x.want)]++
				}
			}
			for _, kind := range []Kind{WebSocket, Passthrough} {
				for s := range stateCount {
					if key := fmt.Sprintf("active %s a %v", kind, s); got[key] != want[key] {
						t.Fatalf("seed %d, step %d: %s: got %v, want %v", seed, step, key, got[key], want[key])
					}
				}
			}
		}
		for _, x := range all {
			finish(x.c, Admin)
			if x.c.State() != Closed {
				t.Fatalf("seed %d: got state %v at the end", seed, x.c.State())
			}
		}
		if r.Len() != 0 || placed(routes[WebSocket], "b:80")+placed(routes[Passthrough], "b:80") != 0 {
			t.Fatalf("seed %d: got %d connections left, and places at the upstream", seed, r.Len())
		}
	}
}

// logs is a route's settings that want to know of connections that have ended.
type logs func(last View)

func (logs) Logs() bool { return true }

func (l logs) Ended(last View) { l(last) }

// C15: when it is logged that a connection has ended, nothing of it is left.
func TestTheLogComesWhenTheRecordIsGone(t *testing.T) {
	r := New()
	route := r.Retain(Passthrough, "a")
	route.SetLimits(Limits{Connections: new(1)})
	var told []View
	route.Settings.Store(logs(func(last View) {
		told = append(told, last)
		if _, ok := r.Get(last.ID); ok || r.Len() != 0 || placed(route, "app:80") != 0 {
			t.Errorf("got %d connections and %d at the upstream when the end was logged, want none", r.Len(), placed(route, "app:80"))
		}
		if len(told) > 1 {
			return
		}
		next, err := r.Admit(route, Info{}, new(owner))
		if err != nil {
			t.Fatalf("got its place not free when the end was logged: %v", err)
		}
		next.Done()
	}))
	c := opened(t, r, route, new(owner), "app:80")
	finish(c, Stuck)
	c.Done()
	if len(told) != 2 || told[0].ID != c.ID() || told[0].Reason != Stuck || told[0].Upstream != "app:80" {
		t.Errorf("got %+v logged, want each connection once, as it was", told)
	}
}

// C10, C20: 10,000 connections that end at once are gone when the last of them says so:
// there is no queue, and nobody to wait for.
func TestManyEndAtOnce(t *testing.T) {
	const many = 10_000
	for name, end := range map[string]func(r *Registry, conns []*Conn){
		"each by itself": func(_ *Registry, conns []*Conn) {
			var all sync.WaitGroup
			for part := range 20 {
				all.Go(func() {
					for i := part; i < many; i += 20 {
						conns[i].Close(Ending{Reason: ClientGone})
					}
				})
			}
			all.Wait()
		},
		"by the admin API": func(r *Registry, _ []*Conn) {
			if n := r.EndSelected(Filter{}, 0, Ending{Reason: Admin}); n != many {
				t.Errorf("got %d selected, want all", n)
			}
		},
		"by a stop": func(r *Registry, _ []*Conn) {
			if cut := r.Shutdown(t.Context()); cut != 0 {
				t.Errorf("got %d cut, want none", cut)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := New()
			route := r.Retain(Passthrough, "a")
			r.SetLimits(Limits{Connections: new(many), PerIP: new(many)}, 0)
			var ended atomic.Int64
			route.Settings.Store(logs(func(View) { ended.Add(1) }))
			conns := make([]*Conn, many)
			for i := range conns {
				o := new(owner)
				c := opened(t, r, route, o, "app:80")
				o.whenEnd = func(Ending) { c.Done() }
				conns[i] = c
			}
			end(r, conns)
			if r.Len() != 0 || placed(route, "app:80") != 0 || ended.Load() != many {
				t.Errorf("got %d connections and %d at the upstream left, %d logged; want all gone", r.Len(), placed(route, "app:80"), ended.Load())
			}
			wantNothingCounted(t, r)
		})
	}
}

// BenchmarkSweep is what the regular look at 100,000 connections takes (C81).
func BenchmarkSweep(b *testing.B) {
	r, _ := crowd(b, 100_000)
	r.watch = Watch{LongLived: time.Hour}
	b.ReportAllocs()
	for b.Loop() {
		r.Sweep()
	}
}
