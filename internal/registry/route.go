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
	byAge     byAge                // its connections
	declared  int                  // Retain calls without their Release
	upstreams map[string]*Upstream // by key
	limits    limits               // its own
	lifts     lifts

	bytes    [2]prometheus.Counter
	messages [2]prometheus.Counter // nil unless it is a route of WebSockets
}

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

// IdleWarned counts a connection of which it was logged that it is inactive, and
// will be closed.
func (t *Route) IdleWarned() {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	if t.reg.routes[t.key] == t { // else nobody would delete the series
		t.reg.metrics.idleWarned(t)
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
