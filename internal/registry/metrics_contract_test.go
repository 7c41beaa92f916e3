// This file holds what the metrics promise to dashboards and alerts: names, types and
// labels, for each kind of connection, and that all of a route goes with it.

package registry

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// promised are the metrics by name, without the prefix, with their labels.
var promised = map[string]struct {
	of     string
	labels string
}{
	"active":                  {"GAUGE", "kind route state"},
	"opened_total":            {"COUNTER", "kind route"},
	"closed_total":            {"COUNTER", "kind reason route"},
	"refused_total":           {"COUNTER", "kind reason route"},
	"bytes_total":             {"COUNTER", "direction kind route"},
	"messages_total":          {"COUNTER", "direction route"},
	"duration_seconds":        {"HISTOGRAM", "kind route"},
	"state_seconds":           {"HISTOGRAM", "kind state"},
	"held_seconds":            {"HISTOGRAM", "route"},
	"resumes_total":           {"COUNTER", "result route"},
	"replayed_messages_total": {"COUNTER", "route"},
	"replay_bytes":            {"GAUGE", ""},
	"migrations_total":        {"COUNTER", "result route"},
	"idle_warnings_total":     {"COUNTER", "route"},
	"upstream_connections":    {"GAUGE", "route upstream"},
	"upstream_healthy":        {"GAUGE", "route upstream"},
	"sweep_seconds":           {"HISTOGRAM", ""},
	"sweeper_found_total":     {"COUNTER", ""},
}

// checked are upstreams of a config.
type checked []UpstreamState

func (c checked) Upstreams() []UpstreamState { return c }

// allReasons are those of any kind's end.
var allReasons = []Reason{
	ClientClosed, ClientGone, BackendClosed, BackendLost, ClientProtocol, BackendBroke, Idle, NoData, Lifetime, PingTimeout,
	WriteTimeout, TooBig, ResumeTimeout, Overflow, InDoubt, Torn, Refused, Poison, Orphan, Shutdown, Admin, Pressure,
	EOF, Reset, Dead, HalfOpenTimeout, Stuck, Dial, Unhealthy,
}

// liveFully lets everything happen on a route that metrics tell of, and returns the
// connections that live.
func liveFully(t *testing.T, r *Registry, kind Kind, name string) (route *Route, live []*Conn) {
	t.Helper()
	route = r.Retain(kind, name)
	route.Settings.Store(checked{{Key: "app:80", Dial: "app:80", Healthy: true}, {Key: "app:81", Dial: "app:81"}})
	start := func() *Conn {
		t.Helper()
		c, err := r.Admit(route, Info{Kind: kind, Client: "192.0.2.1"}, new(owner))
		if err != nil {
			t.Fatal(err)
		}
		c.Attempt(choose(route, "app:80"), "app:80", time.Time{})
		return c
	}
	states := []State{Connecting, Open, HalfOpen, Closing}
	if kind == WebSocket {
		states = []State{Connecting, Open, Held, Migrating, Closing}
	}
	for _, s := range states {
		c := start()
		force(t, c, s)
		live = append(live, c)
	}
	for _, reason := range allReasons {
		c := start()
		c.Open("")
		c.Count(In, 10, 0)
		c.Count(Out, 10, 0)
		if kind == WebSocket {
			c.Count(In, 0, 1)
			c.Hold()
			c.TakeOver(choose(route, "app:81"), "app:81", 1)
			c.Migrate()
			c.Stay()
		}
		finish(c, reason)
	}
	for _, reason := range []string{"handshake", "origin", LimitConnections, LimitPerIP, "no_upstream", "dial", "stopping"} {
		route.Refused(reason)
	}
	if kind == Passthrough {
		route.IdleWarned()
	}
	return route, live
}

func TestPromisedMetrics(t *testing.T) {
	r := New()
	routes := make(map[*Route][]*Conn)
	for kind, name := range map[Kind]string{WebSocket: "chat", Passthrough: "tunnels"} {
		route, live := liveFully(t, r, kind, name)
		routes[route] = live
	}
	r.Sweep()
	problems, err := testutil.GatherAndLint(gatherer(t, r))
	if err != nil || len(problems) > 0 {
		t.Errorf("got problems %v, error %v, want none", problems, err)
	}
	missing := make(map[string]bool)
	for name := range promised {
		missing["caddy_connections_"+name] = true
	}
	families, err := gatherer(t, r).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		name := f.GetName()
		want, known := promised[strings.TrimPrefix(name, "caddy_connections_")]
		if !known || f.GetType().String() != want.of {
			t.Errorf("%s: got a %v, want what was promised", name, f.GetType())
		}
		delete(missing, name)
		for _, m := range f.GetMetric() {
			var names []string
			for _, l := range m.GetLabel() {
				names = append(names, l.GetName())
			}
			slices.Sort(names)
			if got := strings.Join(names, " "); got != want.labels {
				t.Errorf("%s: got labels %q, want %q", name, got, want.labels)
			}
		}
	}
	for name := range missing {
		t.Errorf("%s is missing", name)
	}
	got := gathered(t, r)
	for _, series := range []string{
		"active websocket chat held", "active websocket chat migrating", "active passthrough tunnels half_open",
		"state_seconds websocket held", "state_seconds passthrough closing", "held_seconds chat", "idle_warnings_total tunnels",
		"refused_total passthrough dial tunnels", "closed_total websocket poison chat", "closed_total passthrough stuck tunnels",
		"upstream_connections chat app:81", "upstream_healthy tunnels app:81", "messages_total in chat", "bytes_total out passthrough tunnels",
	} {
		if _, ok := got[series]; !ok {
			t.Errorf("got no series %q", series)
		}
	}
	for series := range got {
		if ofOther := strings.HasPrefix(series, "messages_total") && strings.Contains(series, "tunnels"); ofOther {
			t.Errorf("got %q, want none: nobody sees messages there", series)
		}
	}

	for route, live := range routes {
		for _, c := range live {
			finish(c, Orphan)
		}
		r.Release(route)
	}
	for series := range gathered(t, r) {
		if strings.Contains(series, "chat") || strings.Contains(series, "tunnels") {
			t.Errorf("got series %q of a route that is gone", series)
		}
	}
}

// A route that is gone takes nothing of another kind's with it that has got its name.
func TestMetricsOfANameOfTwoKinds(t *testing.T) {
	for _, kinds := range [][2]Kind{{WebSocket, Passthrough}, {Passthrough, WebSocket}} {
		r := New()
		before, old := liveFully(t, r, kinds[0], "site")
		liveFully(t, r, kinds[1], "site")
		alone := New()
		liveFully(t, alone, kinds[1], "site")
		for _, c := range old {
			finish(c, Orphan)
		}
		r.Release(before)
		want, got := gathered(t, alone), gathered(t, r)
		for series, value := range want {
			if strings.HasPrefix(series, "state_seconds") {
				continue // they have no route
			}
			if g, ok := got[series]; !ok || g != value {
				t.Errorf("%s after %s: %s: got %v (there: %t), want %v", kinds[1], kinds[0], series, g, ok, value)
			}
		}
		for series := range got {
			if _, ok := want[series]; !ok && strings.Contains(series, "site") {
				t.Errorf("%s after %s: got %q, want it gone", kinds[1], kinds[0], series)
			}
		}
	}
}
