package registry

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

type routeKey struct {
	kind Kind
	name string
}

// Route is what the registry knows of a route: the connections it has, the
// upstreams they use, their totals. It lives as long as a config declares it or
// a connection uses it.
type Route struct {
	// Settings is what the route's newest config says about live connections;
	// its type is the business of who declares the route.
	Settings atomic.Value

	key       routeKey
	reg       *Registry
	conns     int                  // guarded by Registry.mu, as is what follows
	declared  int                  // Retain calls without their Release
	upstreams map[string]*Upstream // those in use

	bytes    [2]prometheus.Counter
	messages [2]prometheus.Counter
}

// Upstream is a backend of a route, while connections use it.
type Upstream struct {
	name  string // as configured
	conns int    // guarded by Registry.mu

	redials   redials
	probation redials // of those whose message may be what breaks it

	// Answers is set once the upstream has answered a ping: only then is its
	// silence a sign that it is dead.
	Answers atomic.Bool
	// Warned is set once it was logged that the upstream answers no ping.
	Warned atomic.Bool
}

// Name is the upstream's address as configured.
func (u *Upstream) Name() string { return u.name }

// Retain returns the route of that name, made if there is none, and keeps it
// until Release.
func (r *Registry) Retain(kind Kind, name string) *Route {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := routeKey{kind, name}
	route := r.routes[key]
	if route == nil {
		route = &Route{key: key, reg: r, upstreams: make(map[string]*Upstream)}
		r.metrics.bind(route)
		r.routes[key] = route
	}
	route.declared++
	return route
}

// Release ends what Retain began, and reports whether the route is still
// retained by others.
func (r *Registry) Release(route *Route) (retained bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	route.declared--
	r.dropUnused(route)
	return route.declared > 0
}

// Name is the route's name.
func (t *Route) Name() string { return t.key.name }

// Choose picks an upstream and takes a place in its count, in one step, so that
// two connections never choose by the same counts. pick gets the number of live
// connections of a named upstream and returns the name of its choice; it must
// not block. "" is no choice: Choose returns nil.
func (t *Route) Choose(pick func(conns func(upstream string) int) string) *Upstream {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	name := pick(func(upstream string) int {
		if u := t.upstreams[upstream]; u != nil {
			return u.conns
		}
		return 0
	})
	if name == "" {
		return nil
	}
	u := t.upstreams[name]
	if u == nil {
		u = &Upstream{name: name}
		t.upstreams[name] = u
	}
	u.conns++
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
	if u.conns == 0 {
		delete(t.upstreams, u.name)
	}
}

func (t *Route) count(d Direction, bytes, messages int) {
	t.bytes[d].Add(float64(bytes))
	if messages > 0 {
		t.messages[d].Add(float64(messages))
	}
}

// dropUnused forgets a route that nothing declares or uses, with its metrics.
// Registry.mu is held.
func (r *Registry) dropUnused(route *Route) {
	if route.declared > 0 || route.conns > 0 || r.routes[route.key] != route {
		return
	}
	delete(r.routes, route.key)
	r.metrics.forget(route)
}
