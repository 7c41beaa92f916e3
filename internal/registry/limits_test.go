// This file tests the limits: what is refused, and what counts towards what.

package registry

import (
	"errors"
	"fmt"
	"testing"
)

// arrival is a connection that comes, and stays if it is admitted.
type arrival struct {
	route, client string
	want          string // how LimitError shows it; "" for admitted
}

const (
	routeFull    = "max_connections of the route"
	registryFull = "max_connections of the registry"
	routeIP      = "max_connections_per_ip of the route"
	registryIP   = "max_connections_per_ip of the registry"
)

func TestLimits(t *testing.T) {
	const one, other = "192.0.2.1", "192.0.2.2"
	tests := map[string]struct {
		all      Limits
		prefix   int
		routes   map[string]Limits
		arrivals []arrival
	}{
		"unset is unlimited": {
			arrivals: []arrival{{"a", one, ""}, {"a", one, ""}, {"b", one, ""}},
		},
		"zero of the registry is unlimited": {
			all:      Limits{Connections: new(0), PerIP: new(0)},
			arrivals: []arrival{{"a", one, ""}, {"a", one, ""}, {"b", one, ""}},
		},
		"the registry's limit is for the sum over all routes": {
			all:      Limits{Connections: new(3)},
			arrivals: []arrival{{"a", one, ""}, {"b", one, ""}, {"a", other, ""}, {"a", one, registryFull}, {"c", other, registryFull}},
		},
		"a route's limit is for that route": {
			routes:   map[string]Limits{"a": {Connections: new(2)}},
			arrivals: []arrival{{"a", one, ""}, {"a", other, ""}, {"a", one, routeFull}, {"b", one, ""}, {"b", one, ""}, {"b", one, ""}},
		},
		"a connection needs room in both": {
			all:      Limits{Connections: new(3)},
			routes:   map[string]Limits{"a": {Connections: new(2)}, "b": {Connections: new(2)}},
			arrivals: []arrival{{"a", one, ""}, {"a", one, ""}, {"a", one, routeFull}, {"b", one, ""}, {"b", one, registryFull}},
		},
		"the route is named when both are full": {
			all:      Limits{Connections: new(1)},
			routes:   map[string]Limits{"a": {Connections: new(1)}},
			arrivals: []arrival{{"a", one, ""}, {"a", one, routeFull}, {"b", one, registryFull}},
		},
		"zero of a route lifts the registry's limit, and does not fill it": {
			all:      Limits{Connections: new(1)},
			routes:   map[string]Limits{"free": {Connections: new(0)}},
			arrivals: []arrival{{"free", one, ""}, {"free", one, ""}, {"b", one, ""}, {"b", one, registryFull}, {"free", one, ""}},
		},
		"the registry's limit per IP is for the sum over all routes": {
			all:      Limits{PerIP: new(2)},
			arrivals: []arrival{{"a", one, ""}, {"b", one, ""}, {"a", one, registryIP}, {"c", one, registryIP}, {"c", other, ""}},
		},
		"a route's limit per IP is for that route": {
			routes:   map[string]Limits{"a": {PerIP: new(1)}},
			arrivals: []arrival{{"a", one, ""}, {"a", one, routeIP}, {"a", other, ""}, {"b", one, ""}, {"b", one, ""}},
		},
		"a client needs room in both": {
			all:      Limits{PerIP: new(3)},
			routes:   map[string]Limits{"a": {PerIP: new(2)}},
			arrivals: []arrival{{"a", one, ""}, {"a", one, ""}, {"a", one, routeIP}, {"b", one, ""}, {"b", one, registryIP}, {"a", one, routeIP}},
		},
		"zero per IP of a route lifts the registry's, and does not fill it": {
			all:      Limits{PerIP: new(1)},
			routes:   map[string]Limits{"free": {PerIP: new(0)}},
			arrivals: []arrival{{"free", one, ""}, {"free", one, ""}, {"b", one, ""}, {"b", one, registryIP}},
		},
		"zero lifts only the limit of its kind": {
			all:      Limits{Connections: new(3), PerIP: new(1)},
			routes:   map[string]Limits{"all": {Connections: new(0)}, "ip": {PerIP: new(0)}},
			arrivals: []arrival{{"all", one, ""}, {"all", one, registryIP}, {"ip", one, ""}, {"ip", one, ""}, {"ip", one, ""}, {"ip", one, registryFull}, {"all", other, ""}},
		},
		"per IP comes first when both are full": {
			all:      Limits{Connections: new(1), PerIP: new(1)},
			arrivals: []arrival{{"a", one, ""}, {"a", one, registryIP}, {"a", other, registryFull}},
		},
		"the registry's limit per IP comes before the route's limit": {
			all:      Limits{PerIP: new(1)},
			routes:   map[string]Limits{"a": {Connections: new(1)}},
			arrivals: []arrival{{"a", one, ""}, {"a", one, registryIP}, {"a", other, routeFull}},
		},
		"what is refused by one limit takes no room in another": {
			all:      Limits{Connections: new(2), PerIP: new(2)},
			routes:   map[string]Limits{"a": {Connections: new(1)}},
			arrivals: []arrival{{"a", one, ""}, {"a", one, routeFull}, {"a", one, routeFull}, {"b", one, ""}, {"b", other, registryFull}},
		},
		"an IPv4 address mapped into IPv6 is the same client": {
			all:      Limits{PerIP: new(2)},
			arrivals: []arrival{{"a", one, ""}, {"a", "::ffff:192.0.2.1", ""}, {"a", "::ffff:c000:201", registryIP}, {"a", one, registryIP}, {"a", "::ffff:192.0.2.2", ""}},
		},
		"IPv6 goes by /64 unless told otherwise": {
			all:      Limits{PerIP: new(1)},
			arrivals: []arrival{{"a", "2001:db8::1", ""}, {"a", "2001:db8::ffff:0:0:1", registryIP}, {"a", "2001:db8:0:1::1", ""}},
		},
		"IPv6 goes by /56 if told so, IPv4 by address": {
			all: Limits{PerIP: new(1)}, prefix: 56,
			arrivals: []arrival{{"a", "2001:db8::1", ""}, {"a", "2001:db8:0:ff::1", registryIP}, {"a", "2001:db8:0:100::1", ""}, {"a", one, ""}, {"a", other, ""}},
		},
		"a route's limit goes by the same prefix": {
			routes: map[string]Limits{"a": {PerIP: new(1)}}, prefix: 128,
			arrivals: []arrival{{"a", "2001:db8::1", ""}, {"a", "2001:db8::2", ""}, {"a", "2001:db8:0::2", routeIP}},
		},
		"a prefix that is none is the default": {
			all: Limits{PerIP: new(1)}, prefix: 129,
			arrivals: []arrival{{"a", "2001:db8::1", ""}, {"a", "2001:db8::2", registryIP}, {"a", "2001:db8:0:1::1", ""}},
		},
		"a zone does not make another client": {
			all: Limits{PerIP: new(2)}, prefix: 128,
			arrivals: []arrival{{"a", "fe80::1%eth0", ""}, {"a", "fe80::1%eth1", ""}, {"a", "fe80::1", registryIP}, {"a", "fe80::2%eth0", ""}},
		},
		"a client without an IP counts only in all": {
			all:      Limits{Connections: new(3), PerIP: new(1)},
			arrivals: []arrival{{"a", "", ""}, {"a", "@", ""}, {"a", "", ""}, {"a", "", registryFull}},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := New()
			r.SetLimits(tt.all, tt.prefix)
			routes := map[string]*Route{}
			for _, name := range []string{"a", "b", "c", "all", "free", "ip"} {
				routes[name] = r.Retain(WebSocket, name)
				routes[name].SetLimits(tt.routes[name])
			}
			// The second time shows that all room was given back.
			for range 2 {
				for i, a := range tt.arrivals {
					wantArrival(t, r, routes[a.route], i, a)
				}
				for _, c := range r.live(&r.byAge) {
					finish(c, Idle)
				}
				wantNothingCounted(t, r)
			}
		})
	}
}

// wantArrival lets the i-th connection arrive.
func wantArrival(t *testing.T, r *Registry, route *Route, i int, a arrival) {
	t.Helper()
	before := r.Len()
	c, err := r.Admit(route, Info{Kind: WebSocket, Client: a.client}, new(owner))
	if a.want == "" {
		if err != nil || c == nil || r.Len() != before+1 {
			t.Fatalf("arrival %d, %q at %s: got error %v, want it admitted", i, a.client, a.route, err)
		}
		return
	}
	var limit *LimitError
	if !errors.As(err, &limit) || c != nil || r.Len() != before {
		t.Fatalf("arrival %d, %q at %s: got record %v and error %v, want %s", i, a.client, a.route, c, err, a.want)
	}
	if got := fmt.Sprintf("%s of the %s", limit.Reason, limit.Scope); got != a.want {
		t.Fatalf("arrival %d, %q at %s: got refused by %s, want by %s", i, a.client, a.route, got, a.want)
	}
}

// wantNothingCounted checks that a registry without connections has all of its room.
func wantNothingCounted(t *testing.T, r *Registry) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counted != 0 || len(r.limits.byIP) != 0 {
		t.Errorf("got %d connections and %v by IP left in the registry, want none", r.counted, r.limits.byIP)
	}
	for _, route := range r.routes {
		if route.conns != 0 || len(route.limits.byIP) != 0 {
			t.Errorf("route %s: got %d connections and %v by IP left, want none", route.Name(), route.conns, route.limits.byIP)
		}
	}
}

func TestLimitErrorNamesLimitScopeAndValue(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	r.SetLimits(Limits{Connections: new(1)}, 0)
	admit(t, r, route, new(owner))
	_, err := r.Admit(route, Info{}, new(owner))
	if got, want := fmt.Sprint(err), "max_connections of the registry is reached: 1"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Nobody pays for counting by IP who does not ask for it, and who does, does so by
// client and not by connection.
func TestLimitsAddNothingToAConnection(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	cost := func() float64 {
		return testing.AllocsPerRun(500, func() { admit(t, r, route, nil).Done() })
	}
	admit(t, r, route, new(owner))
	without := cost()
	if r.limits.byIP != nil || route.limits.byIP != nil {
		t.Error("got clients counted by IP, want that only with a limit")
	}
	r.SetLimits(Limits{Connections: new(9), PerIP: new(9)}, 0)
	route.SetLimits(Limits{Connections: new(9), PerIP: new(9)})
	if with := cost(); with != without {
		t.Errorf("got %v allocations for each connection with limits and %v without, want the same", with, without)
	}
	route.SetLimits(Limits{})
	r.SetLimits(Limits{Connections: new(9)}, 0)
	if r.limits.byIP != nil || route.limits.byIP != nil {
		t.Error("got clients counted by IP after the limit was lifted")
	}
}
