// This file holds what the tests of the package share.

package registry

import (
	"sync"
	"testing"
	"time"
)

// owner counts what it is told.
type owner struct {
	mu      sync.Mutex
	ends    []Ending
	aborts  int
	again   int
	whenEnd func(Ending)
}

func (o *owner) End(e Ending) {
	o.mu.Lock()
	o.ends = append(o.ends, e)
	do := o.whenEnd
	o.mu.Unlock()
	if do != nil {
		do(e)
	}
}

func (o *owner) Abort() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.aborts++
}

func (o *owner) Reconsider() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.again++
}

func (o *owner) Move() error { return nil }

func (o *owner) ended() []Ending {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]Ending(nil), o.ends...)
}

func (o *owner) counts() (ends, aborts, again int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.ends), o.aborts, o.again
}

// admit makes a record of a connection that is being dialed.
func admit(t *testing.T, r *Registry, route *Route, o Owner) *Conn {
	t.Helper()
	c, err := r.Admit(route, Info{Kind: WebSocket, Client: "192.0.2.1", Host: "example.com", URI: "/chat", Protocol: "h1"}, o)
	if err != nil {
		t.Fatalf("admitting: %v", err)
	}
	return c
}

// opened makes a record of an open connection to an upstream.
func opened(t *testing.T, r *Registry, route *Route, o Owner, upstream string) *Conn {
	t.Helper()
	c := admit(t, r, route, o)
	c.Attempt(choose(route, upstream), upstream, time.Time{})
	open(c, o, "")
	return c
}

// open opens a connection under a new owner.
func open(c *Conn, o Owner, subprotocol string) {
	if c.Open(subprotocol) {
		c.Handover(o)
	}
}

// finish ends a connection and removes its record.
func finish(c *Conn, reason Reason) {
	c.Close(Ending{Reason: reason})
	c.Done()
}

// choose takes a place at the upstream of that name.
func choose(route *Route, name string) *Upstream {
	return route.Choose(func(func(string) Load) string { return name })
}

// placed returns how many places at an upstream are taken.
func placed(route *Route, name string) (n int) {
	route.Choose(func(load func(string) Load) string {
		n = load(name).Conns
		return ""
	})
	return n
}

// force puts a record into a state by legal steps.
func force(t *testing.T, c *Conn, s State) {
	t.Helper()
	switch s {
	case Connecting:
	case Open:
		open(c, new(owner), "")
	case Held:
		open(c, new(owner), "")
		c.Hold()
	case Migrating:
		open(c, new(owner), "")
		c.Migrate()
	case HalfOpen:
		open(c, new(owner), "")
		c.HalfClose()
	case Closing:
		open(c, new(owner), "")
		c.Close(Ending{Reason: Admin})
	case Closed:
		finish(c, Admin)
	default:
		t.Fatalf("no way to %v", s)
	}
	if got := c.State(); got != s {
		t.Fatalf("got state %v, want %v", got, s)
	}
}
