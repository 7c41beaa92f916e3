// This file has records live between backends at random, held against a model, and at
// the same time.

package registry

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
)

// model is what a record should be.
type model struct {
	state  State
	at     string // where it has a place; "" for none
	resume int
}

// What a session, an opening and the admin API may do, in any order: state, places and
// totals are those of a model after every step.
func TestRandomLivesBetweenBackends(t *testing.T) {
	names := []string{"a:80", "b:80", "c:80"}
	for seed := range uint64(150) {
		rng := rand.New(rand.NewPCG(seed, 41))
		r := New()
		route := r.Retain(WebSocket, "route")
		models := map[*Conn]*model{}
		var conns []*Conn
		var resumed, moved, stayed, lost, ended, endedMoves float64
		for step := range 300 {
			if len(conns) == 0 || rng.IntN(8) == 0 {
				c := admit(t, r, route, new(owner))
				conns, models[c] = append(conns, c), &model{}
			}
			i := rng.IntN(len(conns))
			c := conns[i]
			m := models[c]
			name := names[rng.IntN(len(names))]
			switch rng.IntN(9) {
			case 0:
				if m.state == Connecting {
					c.Attempt(choose(route, name), name, time.Time{})
					m.at = name
				}
			case 1:
				if m.state == Connecting {
					open(c, new(owner), "")
					m.state = Open
				}
			case 2:
				if ok, want := c.Hold(), m.state == Open || m.state == Migrating || m.state == Held; ok != want {
					t.Fatalf("seed %d, step %d: Hold of %v: got %t", seed, step, m.state, ok)
				} else if ok {
					if m.state == Migrating {
						lost++
					}
					m.state, m.at = Held, ""
				}
			case 3, 4:
				if ok, want := c.Migrate(), m.state == Open; ok != want {
					t.Fatalf("seed %d, step %d: Migrate of %v: got %t", seed, step, m.state, ok)
				} else if ok {
					m.state = Migrating
				}
			case 5:
				if c.Stay(); m.state == Migrating {
					m.state = Open
					stayed++
				}
			case 6, 7:
				if m.state == Connecting {
					break
				}
				up := choose(route, name)
				ok := c.TakeOver(up, name, 1)
				if want := m.state == Held || m.state == Migrating; ok != want {
					t.Fatalf("seed %d, step %d: TakeOver of %v: got %t", seed, step, m.state, ok)
				}
				if !ok {
					route.Leave(up)
					break
				}
				if m.state == Held {
					resumed++
				} else {
					moved++
				}
				m.state, m.at = Open, name
				m.resume++
			case 8:
				switch m.state {
				case Held:
					ended++
				case Migrating:
					endedMoves++
				default: // it had its backend
				}
				if c.Close(Ending{Reason: Idle}); rng.IntN(2) == 0 {
					c.Done()
					conns = append(conns[:i], conns[i+1:]...)
					delete(models, c)
				} else {
					m.state = Closing
				}
			}
			check(t, r, route, seed, step, names, models)
			if t.Failed() {
				return
			}
		}
		for _, c := range conns {
			switch models[c].state {
			case Held:
				ended++
			case Migrating:
				endedMoves++
			default: // counted before, or nothing to count
			}
			finish(c, Idle)
		}
		got := gathered(t, r)
		for key, want := range map[string]float64{
			"resumes_total resumed route": resumed, "resumes_total idle route": ended,
			"migrations_total moved route": moved, "migrations_total stayed route": stayed,
			"migrations_total lost route": lost, "migrations_total idle route": endedMoves,
			"replayed_messages_total route": resumed + moved, "held_seconds route": resumed + ended,
		} {
			if got[key] != want {
				t.Errorf("seed %d: %s: got %v, want %v", seed, key, got[key], want)
			}
		}
		if len(route.upstreams) != 0 {
			t.Fatalf("seed %d: got %d upstreams left, want none", seed, len(route.upstreams))
		}
	}
}

// check compares a registry with models of its connections.
func check(t *testing.T, r *Registry, route *Route, seed uint64, step int, names []string, models map[*Conn]*model) {
	t.Helper()
	want, states := map[string]int{}, map[string]int{}
	for c, m := range models {
		if m.at != "" {
			want[m.at]++
		}
		states[m.state.String()]++
		if v := c.View(); v.State != m.state.String() || v.Upstream != m.at || v.Resumes != m.resume || v.Replayed != m.resume {
			t.Errorf("seed %d, step %d: got %+v, want %+v", seed, step, v, *m)
		}
	}
	stats := r.Stats()
	for _, name := range names {
		if got := placed(route, name); got != want[name] || stats.ByUpstream[name] != want[name] {
			t.Errorf("seed %d, step %d: %s: got %d places, %d in Stats, want %d", seed, step, name, got, stats.ByUpstream[name], want[name])
		}
	}
	for s := range stateCount {
		if stats.ByState[s.String()] != states[s.String()] {
			t.Errorf("seed %d, step %d: got %d %v, want %d", seed, step, stats.ByState[s.String()], s, states[s.String()])
		}
	}
	if len(route.upstreams) != len(want) {
		t.Errorf("seed %d, step %d: got %d upstreams kept, want the %d in use", seed, step, len(route.upstreams), len(want))
	}
}

// Sessions go from backend to backend while others end them, plan for them and look
// at them: no place is lost, or given back twice, and nobody is counted twice.
func TestPlacesUnderConcurrency(t *testing.T) {
	const conns = 64
	r := New()
	route := r.Retain(WebSocket, "a")
	names := []string{"a:80", "b:80", "c:80"}
	least := func(load func(string) Load) string {
		best := names[0]
		for _, name := range names {
			if n := load(name).Conns; n < 0 || n > 2*conns {
				t.Errorf("got %d places taken at %s, want 0 to %d", n, name, 2*conns)
			} else if n < load(best).Conns {
				best = name
			}
		}
		return best
	}
	ctx, cancel := context.WithCancel(t.Context())
	var watchers, lives sync.WaitGroup
	for range 2 {
		watchers.Go(func() { // until the last one is done
			for ctx.Err() == nil {
				r.MovePaced(route, func(name string) bool { return name == "a:80" }, time.Millisecond)
				total := 0
				for _, n := range r.Stats().ByUpstream {
					total += n
				}
				if total > conns {
					t.Errorf("got %d connections on upstreams, want at most %d", total, conns)
				}
				r.List(Filter{Upstream: "b:80"}, 10, "")
			}
		})
	}
	for i := range conns {
		c := admit(t, r, route, new(owner))
		rounds := 100 + i
		lives.Go(func() { // as a session does
			rng := rand.New(rand.NewPCG(uint64(i), 6))
			c.Attempt(route.Choose(least), "", time.Time{})
			open(c, new(owner), "")
			for range rounds {
				moves := rng.IntN(2) == 0
				if moves {
					moves = c.Migrate()
				}
				if !moves && !c.Hold() {
					break
				}
				up := route.Choose(least)
				if err := route.Redial(ctx, up, 8); err != nil {
					t.Error(err)
				}
				route.Redialed(up)
				if rng.IntN(5) == 0 {
					route.Leave(up) // it refused
					if moves {
						c.Stay()
					}
					continue
				}
				if !c.TakeOver(up, "", 1) {
					route.Leave(up)
					break
				}
			}
			c.Close(Ending{Reason: Idle})
			c.Done()
		})
		if i%4 == 0 {
			lives.Go(func() {
				for c.View().Resumes < 50 && c.State() != Closed {
					_ = c.Upstream()
				}
				c.Close(Ending{Reason: Admin})
			})
		}
	}
	lives.Wait()
	cancel()
	watchers.Wait()
	if len(route.upstreams) != 0 || r.Len() != 0 {
		t.Errorf("got %d upstreams and %d connections left, want none", len(route.upstreams), r.Len())
	}
	for key, v := range gathered(t, r) {
		if strings.HasPrefix(key, "active ") && v != 0 {
			t.Errorf("%s: got %v, want 0", key, v)
		}
	}
}
