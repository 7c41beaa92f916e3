// This file holds what the registry knows of a route's upstreams: how many
// connections each has, how often it failed lately, whether it is being drained.

package registry

import (
	"cmp"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// Upstream is a backend of a route. It is known while a config declares it,
// connections use it, or it is being drained.
//
// It is identified by its key: its name, which is its address as configured. If
// there are placeholders in that, a space and the address that they made follow:
// each such address counts for itself. Labels and logs have the name only.
type Upstream struct {
	key      string
	conns    int // guarded by Registry.mu, as is what follows
	declared int // Declare calls without their Forget
	draining bool
	fails    []time.Time // when each recent failure is to be forgotten, by age

	redials   redials
	probation redials // of those whose message may be what breaks it

	// Answers is set once the upstream has answered a ping: only then is its
	// silence a sign that it is dead.
	Answers atomic.Bool
	// Warned is set once it was logged that the upstream answers no ping.
	Warned atomic.Bool
}

// UpstreamKey is the key of an upstream of that name at an address that the
// placeholders in its name made.
func UpstreamKey(name, address string) string { return name + " " + address }

// UpstreamName returns the name in a key.
func UpstreamName(key string) string {
	name, _, _ := strings.Cut(key, " ")
	return name
}

// Key identifies the upstream in its route.
func (u *Upstream) Key() string { return u.key }

// Name is the upstream's address as configured.
func (u *Upstream) Name() string { return UpstreamName(u.key) }

// Load is what speaks for or against choosing an upstream.
type Load struct {
	Conns    int // connections, those that are being made included
	Fails    int // recent failures
	Draining bool
}

// Choose picks an upstream and takes a place in its count, in one step, so that
// two connections never choose by the same counts. pick gets the load of an
// upstream by its key and returns the key of its choice; it must not block. "" is no
// choice: Choose returns nil.
func (t *Route) Choose(pick func(load func(key string) Load) string) *Upstream {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	key := pick(t.load(time.Now()))
	if key == "" {
		return nil
	}
	u := t.upstream(key)
	u.conns++
	return u
}

// Loads calls f with what Choose gives its pick. f must not block.
func (t *Route) Loads(f func(load func(key string) Load)) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	f(t.load(time.Now()))
}

// load returns the loads at a time. Registry.mu is held.
func (t *Route) load(now time.Time) func(key string) Load {
	return func(key string) Load {
		u := t.upstreams[key]
		if u == nil {
			return Load{}
		}
		u.forgive(now)
		return Load{Conns: u.conns, Fails: len(u.fails), Draining: u.draining}
	}
}

// upstream returns the upstream with a key, made if there is none. Registry.mu is held.
func (t *Route) upstream(key string) *Upstream {
	u := t.upstreams[key]
	if u == nil {
		u = &Upstream{key: key}
		t.upstreams[key] = u
	}
	return u
}

// Leave gives back a place that Choose took and no record took over.
func (t *Route) Leave(u *Upstream) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	t.release(u)
}

// release gives a place in an upstream's count back. Registry.mu is held.
func (t *Route) release(u *Upstream) {
	u.conns--
	t.dropUpstream(u)
}

// dropUpstream forgets an upstream that nobody needs to know. Registry.mu is held.
func (t *Route) dropUpstream(u *Upstream) {
	if u.conns == 0 && u.declared == 0 && !u.draining {
		delete(t.upstreams, u.key)
	}
}

// Declare keeps an upstream's state until Forget, also while it has no connection.
func (t *Route) Declare(key string) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	t.upstream(key).declared++
}

// Forget ends what Declare began.
func (t *Route) Forget(key string) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	u := t.upstreams[key]
	u.declared--
	t.dropUpstream(u)
}

// Fail counts a failure of an upstream for some time, and returns how many count now.
func (t *Route) Fail(u *Upstream, lasting time.Duration) int {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	now := time.Now()
	u.forgive(now)
	u.fails = append(u.fails, now.Add(lasting))
	return len(u.fails)
}

// forgive drops the failures that do not count any more. Registry.mu is held.
func (u *Upstream) forgive(now time.Time) {
	n := 0
	for n < len(u.fails) && !u.fails[n].After(now) {
		n++
	}
	if u.fails = u.fails[n:]; len(u.fails) == 0 {
		u.fails = nil
	}
}

// Drain sets whether the upstreams of a name, in one route or, for "", in all that
// have them, are being drained, and returns those routes. A drained upstream is
// chosen for no connection.
func (r *Registry) Drain(name, route string, drain bool) (routes []*Route) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.routes {
		if route != "" && t.key.name != route {
			continue
		}
		found := false
		for key, u := range t.upstreams {
			if UpstreamName(key) == name {
				found = true
				u.draining = drain
				t.dropUpstream(u)
			}
		}
		if found {
			routes = append(routes, t)
		}
	}
	slices.SortFunc(routes, func(a, b *Route) int { return cmp.Compare(a.key.name, b.key.name) })
	return routes
}
