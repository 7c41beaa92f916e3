// This file tests the counts of upstreams, and routes.

package registry

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// A place is held by at most one record and given back once: a random run is
// compared with a model that only notes where each connection is.
func TestPlacesAreGivenBackOnce(t *testing.T) {
	names := []string{"a:80", "b:80", "c:80"}
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := New()
		route := r.Retain(WebSocket, "route")
		var conns []*Conn
		at := map[*Conn]string{}
		for range 300 {
			if len(conns) == 0 || rng.IntN(6) == 0 {
				conns = append(conns, admit(t, r, route, new(owner)))
			}
			i := rng.IntN(len(conns))
			c := conns[i]
			switch rng.IntN(4) {
			case 0, 1:
				name := names[rng.IntN(len(names))]
				up := choose(route, name)
				if up.Name() != name {
					t.Fatalf("seed %d: got upstream %q, want %q", seed, up.Name(), name)
				}
				c.Attempt(up, name, time.Time{})
				at[c] = name
			case 2:
				open(c, new(owner), "")
			case 3:
				finish(c, Idle)
				delete(at, c)
				conns = append(conns[:i], conns[i+1:]...)
			}
			want := map[string]int{}
			for _, name := range at {
				want[name]++
			}
			by := r.Stats().ByUpstream
			for _, name := range names {
				if got := placed(route, name); got != want[name] || by[name] != want[name] {
					t.Fatalf("seed %d: %s: got %d places, %d in Stats, want %d", seed, name, got, by[name], want[name])
				}
			}
			if len(route.upstreams) != len(want) {
				t.Fatalf("seed %d: got %d upstreams kept, want the %d in use", seed, len(route.upstreams), len(want))
			}
		}
		for _, c := range conns {
			finish(c, Idle)
		}
		if len(route.upstreams) != 0 {
			t.Fatalf("seed %d: got %d upstreams left, want none", seed, len(route.upstreams))
		}
	}
}

func TestChooseNothing(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	if up := choose(route, ""); up != nil || len(route.upstreams) != 0 {
		t.Errorf("got upstream %v and %d upstreams, want none", up, len(route.upstreams))
	}
}

// Choosing by the counts and taking a place are one step: connections that come
// at once are spread evenly.
func TestChooseCountsExactly(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	least := func(load func(string) Load) string {
		best := ""
		for i := range 4 {
			if name := fmt.Sprint("app", i); best == "" || load(name).Conns < load(best).Conns {
				best = name
			}
		}
		return best
	}
	var all sync.WaitGroup
	for range 40 {
		c := admit(t, r, route, new(owner))
		all.Go(func() { c.Attempt(route.Choose(least), "", time.Time{}) })
	}
	all.Wait()
	for i := range 4 {
		if n := placed(route, fmt.Sprint("app", i)); n != 10 {
			t.Errorf("app%d: got %d connections, want 10", i, n)
		}
	}
}

func TestWhatAnUpstreamIsKnownForGoesWithItsLastConnection(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	c, d := opened(t, r, route, new(owner), "app:80"), opened(t, r, route, new(owner), "app:80")
	if c.upstream != d.upstream {
		t.Fatal("got two upstreams of one name, want one")
	}
	c.upstream.Answers.Store(true)
	finish(c, Idle)
	if !choose(route, "app:80").Answers.Load() {
		t.Error("got an upstream forgotten that is in use")
	}
}

func TestUpstreamsOfTwoRoutesAreTwo(t *testing.T) {
	r := New()
	a, b := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
	opened(t, r, a, new(owner), "app:80")
	if n := placed(b, "app:80"); n != 0 {
		t.Errorf("got %d places taken in the other route, want 0", n)
	}
}

func TestRetainAndRelease(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	if route.Name() != "a" || r.Retain(WebSocket, "a") != route {
		t.Error("got two routes of one name, want one")
	}
	if r.Retain("other", "a") == route {
		t.Error("got one route for two kinds, want two")
	}
	if !r.Release(route) {
		t.Error("got the route given up with one Retain left")
	}
	c := opened(t, r, route, new(owner), "app:80")
	if r.Release(route) {
		t.Error("got the route still retained after its last Release")
	}
	if _, err := r.Admit(route, Info{Kind: WebSocket}, new(owner)); !errors.Is(err, ErrRouteGone) {
		t.Errorf("got error %v from Admit to a route that is gone, want ErrRouteGone", err)
	}

	// A connection keeps the route, so one that comes back is the same.
	if again := r.Retain(WebSocket, "a"); again != route {
		t.Error("got another route while a connection uses the first")
	}
	if _, err := r.Admit(route, Info{Kind: WebSocket}, new(owner)); err != nil {
		t.Errorf("got error %v from Admit to a route that came back, want none", err)
	}
	for _, c := range r.live(&r.byAge) {
		finish(c, Idle)
	}
	if c.Route() != route {
		t.Error("got another route from a connection")
	}
	r.Release(route)
	if again := r.Retain(WebSocket, "a"); again == route {
		t.Error("got the old route after it was given up and unused, want a new one")
	}
}

func TestAdmitRefusedWhileStopping(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	if cut := r.Shutdown(t.Context()); cut != 0 {
		t.Errorf("got %d cut of none", cut)
	}
	if _, err := r.Admit(route, Info{Kind: WebSocket}, new(owner)); !errors.Is(err, ErrStopping) {
		t.Errorf("got error %v, want ErrStopping", err)
	}
	if r.Len() != 0 {
		t.Errorf("got %d connections, want none", r.Len())
	}
}
