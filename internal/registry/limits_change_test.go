// This file tests limits that change while there are connections, and what is counted
// of refusals.

package registry

import (
	"strings"
	"testing"
)

func TestLimitsChange(t *testing.T) {
	const one = "192.0.2.1"
	at := func(want string) arrival { return arrival{"a", one, want} }
	of := func(client, want string) arrival { return arrival{"a", client, want} }
	tests := map[string]struct {
		live   []string // clients of the route, admitted without limits
		change func(r *Registry, route *Route)
		then   []arrival
	}{
		"a limit below the present count ends nobody and admits nobody": {
			live:   []string{one, one, one},
			change: func(r *Registry, _ *Route) { r.SetLimits(Limits{Connections: new(2)}, 0) },
			then:   []arrival{at(registryFull)},
		},
		"a route's limit below the present count likewise": {
			live:   []string{one, one, one},
			change: func(_ *Registry, route *Route) { route.SetLimits(Limits{Connections: new(2)}) },
			then:   []arrival{at(routeFull)},
		},
		"the registry's limit per IP counts those that are there": {
			live:   []string{one, "192.0.2.2"},
			change: func(r *Registry, _ *Route) { r.SetLimits(Limits{PerIP: new(2)}, 0) },
			then:   []arrival{at(""), at(registryIP), of("192.0.2.2", ""), of("192.0.2.2", registryIP)},
		},
		"a route's limit per IP counts those that are there": {
			live:   []string{one, "192.0.2.2"},
			change: func(_ *Registry, route *Route) { route.SetLimits(Limits{PerIP: new(2)}) },
			then:   []arrival{at(""), at(routeIP), of("192.0.2.2", ""), of("192.0.2.2", routeIP)},
		},
		"a limit that is raised makes room": {
			live: []string{one, one},
			change: func(r *Registry, _ *Route) {
				r.SetLimits(Limits{Connections: new(2), PerIP: new(2)}, 0)
				r.SetLimits(Limits{Connections: new(3), PerIP: new(3)}, 0)
			},
			then: []arrival{at(""), at(registryIP), of("192.0.2.2", registryFull)},
		},
		"a limit that was lifted and is set again counts those that came meanwhile": {
			change: func(r *Registry, route *Route) {
				r.SetLimits(Limits{PerIP: new(1)}, 0)
				r.SetLimits(Limits{}, 0)
				for range 2 {
					_, _ = r.Admit(route, Info{Client: one}, new(owner))
				}
				r.SetLimits(Limits{PerIP: new(3)}, 0)
			},
			then: []arrival{at(""), at(registryIP)},
		},
		"a route's zero takes its connections out of the registry's limits": {
			live: []string{one, one},
			change: func(r *Registry, route *Route) {
				r.SetLimits(Limits{Connections: new(1), PerIP: new(1)}, 0)
				route.SetLimits(Limits{Connections: new(0), PerIP: new(0)})
			},
			then: []arrival{at(""), {"b", one, ""}, {"b", one, registryIP}, {"b", "192.0.2.2", registryFull}},
		},
		"a route's zero that is taken back puts them in again": {
			live: []string{one, one},
			change: func(r *Registry, route *Route) {
				route.SetLimits(Limits{Connections: new(0), PerIP: new(0)})
				r.SetLimits(Limits{Connections: new(3), PerIP: new(2)}, 0)
				route.SetLimits(Limits{})
			},
			then: []arrival{{"b", one, registryIP}, {"b", "192.0.2.2", ""}, {"b", "192.0.2.2", registryFull}},
		},
		"a wider prefix joins clients": {
			live: []string{"2001:db8::1", "2001:db8:0:1::1"},
			change: func(r *Registry, _ *Route) {
				r.SetLimits(Limits{PerIP: new(2)}, 64)
				r.SetLimits(Limits{PerIP: new(2)}, 48)
			},
			then: []arrival{of("2001:db8:0:2::1", registryIP), of("2001:db8:1::1", "")},
		},
		"a narrower prefix parts clients": {
			live: []string{"2001:db8::1", "2001:db8::2"},
			change: func(r *Registry, route *Route) {
				route.SetLimits(Limits{PerIP: new(2)})
				r.SetLimits(Limits{}, 128)
			},
			then: []arrival{of("2001:db8::1", ""), of("2001:db8::1", routeIP), of("2001:db8::2", "")},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := New()
			routes := map[string]*Route{"a": r.Retain(WebSocket, "a"), "b": r.Retain(WebSocket, "b")}
			for i, client := range tt.live {
				wantArrival(t, r, routes["a"], i, arrival{"a", client, ""})
			}
			before := r.live(&r.byAge)
			tt.change(r, routes["a"])
			for i, a := range tt.then {
				wantArrival(t, r, routes[a.route], i, a)
			}
			for _, c := range before {
				if s := c.State(); s != Connecting {
					t.Errorf("got a connection %v by a change of limits, want it to go on", s)
				}
			}
			for _, c := range r.live(&r.byAge) {
				finish(c, Idle)
			}
			wantNothingCounted(t, r)
		})
	}
}

// An orphan still is a connection, and counts as its route last said.
func TestLimitsOfARouteThatGoesAndComesBack(t *testing.T) {
	r := New()
	r.SetLimits(Limits{Connections: new(2)}, 0)
	a, b := r.Retain(WebSocket, "a"), r.Retain(WebSocket, "b")
	a.SetLimits(Limits{Connections: new(1)})
	orphan := admit(t, r, a, new(owner))
	r.Release(a)
	wantArrival(t, r, b, 0, arrival{"b", "", ""})
	wantArrival(t, r, b, 1, arrival{"b", "", registryFull})

	if again := r.Retain(WebSocket, "a"); again != a {
		t.Fatal("got another route while a connection uses the first")
	}
	wantArrival(t, r, a, 2, arrival{"a", "", routeFull})
	finish(orphan, Orphan)
	wantArrival(t, r, a, 3, arrival{"a", "", ""})

	r.Release(a)
	for _, c := range r.live(&r.byAge) {
		finish(c, Idle)
	}
	again := r.Retain(WebSocket, "a")
	if again == a {
		t.Fatal("got a route that was given up and unused, want a new one")
	}
	wantArrival(t, r, again, 4, arrival{"a", "", ""})
	wantArrival(t, r, again, 5, arrival{"a", "", ""})
}

func TestRoomIsGivenBackOnce(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	r.SetLimits(Limits{Connections: new(2), PerIP: new(2)}, 0)
	c := admit(t, r, route, new(owner))
	admit(t, r, route, new(owner))
	c.Close(Ending{Reason: Idle})
	wantArrival(t, r, route, 0, arrival{"a", "192.0.2.1", registryIP}) // it is still there
	c.Done()
	c.Done()
	wantArrival(t, r, route, 1, arrival{"a", "192.0.2.1", ""})
	wantArrival(t, r, route, 2, arrival{"a", "192.0.2.1", registryIP})
}

func TestRefusalsAreCounted(t *testing.T) {
	r := New()
	full, gone, kept := r.Retain(WebSocket, "full"), r.Retain(WebSocket, "gone"), r.Retain(WebSocket, "kept")
	full.SetLimits(Limits{Connections: new(1)})
	refuse := func(route *Route, times int) {
		for range times {
			if _, err := r.Admit(route, Info{Client: "192.0.2.1"}, new(owner)); err == nil {
				t.Errorf("%s: got a connection admitted, want it refused", route.Name())
			}
		}
	}
	expect := func(when string, want map[string]float64) {
		t.Helper()
		got := gathered(t, r)
		for key := range got {
			if _, ok := want[key]; !ok && strings.HasPrefix(key, "refused_total") {
				t.Errorf("%s: got %s: %v, want no such series", when, key, got[key])
			}
		}
		for key, v := range want {
			if got[key] != v {
				t.Errorf("%s: %s: got %v, want %v", when, key, got[key], v)
			}
		}
	}
	expect("at first", nil)
	admit(t, r, full, new(owner))
	refuse(full, 3)
	r.SetLimits(Limits{PerIP: new(1)}, 0)
	refuse(kept, 2)
	r.SetLimits(Limits{}, 0)
	kept.Refused("no_upstream")
	orphan := admit(t, r, gone, new(owner))
	r.Release(gone)
	refuse(gone, 1)
	want := map[string]float64{
		"refused_total websocket max_connections full":        3,
		"refused_total websocket max_connections_per_ip kept": 2,
		"refused_total websocket no_upstream kept":            1,
		"refused_total websocket route_gone gone":             1,
	}
	expect("with limits", want)

	finish(orphan, Orphan)
	refuse(gone, 1)
	gone.Refused("no_upstream")
	delete(want, "refused_total websocket route_gone gone")
	expect("with a route gone", want)

	for _, c := range r.live(&r.byAge) {
		finish(c, Idle)
	}
	r.Shutdown(t.Context())
	refuse(kept, 1)
	want["refused_total websocket stopping kept"] = 1
	expect("stopping", want)
}
