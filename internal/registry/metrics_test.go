// This file tests the metrics as Prometheus sees them.

package registry

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// gathered returns the samples of a fresh Prometheus registry, as every config
// has one, by name and labels.
func gathered(t *testing.T, r *Registry) map[string]float64 {
	t.Helper()
	got := map[string]float64{}
	families, err := gatherer(t, r).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			key := strings.TrimPrefix(f.GetName(), "caddy_connections_") + " " + strings.Join(labels, " ")
			switch {
			case m.GetGauge() != nil:
				got[key] = m.GetGauge().GetValue()
			case m.GetCounter() != nil:
				got[key] = m.GetCounter().GetValue()
			case m.GetHistogram() != nil:
				got[key] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return got
}

func gatherer(t *testing.T, r *Registry) *prometheus.Registry {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	for _, c := range r.Collectors() {
		if err := reg.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	return reg
}

func TestMetricsFollowAConnection(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	expect := func(when string, want map[string]float64) {
		t.Helper()
		got := gathered(t, r)
		for key, v := range want {
			if g, ok := got[key]; !ok || g != v {
				t.Errorf("%s: %s: got %v (there: %t), want %v", when, key, g, ok, v)
			}
		}
	}
	c := admit(t, r, route, new(owner))
	expect("connecting", map[string]float64{"active websocket a connecting": 1})
	if _, ok := gathered(t, r)["opened_total websocket a"]; ok {
		t.Error("got a connection counted as opened before it is")
	}
	c.Attempt(choose(route, "app:80"), "app:80", c.accepted)
	open(c, new(owner), "")
	expect("open", map[string]float64{
		"active websocket a connecting": 0, "active websocket a open": 1, "opened_total websocket a": 1,
	})
	c.Count(In, 100, 1)
	c.Count(Out, 3, 0)
	expect("after data", map[string]float64{
		"bytes_total in websocket a": 100, "bytes_total out websocket a": 3, "messages_total in a": 1, "messages_total out a": 0,
	})
	c.Close(Ending{Reason: Idle})
	expect("closing", map[string]float64{"active websocket a open": 0, "active websocket a closing": 1})
	c.Done()
	expect("closed", map[string]float64{
		"active websocket a closing": 0, "closed_total websocket idle a": 1, "duration_seconds websocket a": 1,
	})
	for key := range gathered(t, r) {
		if strings.HasSuffix(key, " closed") {
			t.Errorf("got a series %q, want none: closed connections are no more", key)
		}
	}
}

func TestMetricsOfResumesAndMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New()
		route := r.Retain(WebSocket, "a")
		start := func() *Conn { return opened(t, r, route, new(owner), "app:80") }
		next := func() *Upstream { return choose(route, "app:81") }

		c := start()
		time.Sleep(3 * time.Second)
		c.Hold()
		time.Sleep(2 * time.Second)
		c.Hold() // it is held already: nothing begins anew
		time.Sleep(2 * time.Second)
		c.TakeOver(next(), "", 5)
		c.Migrate()
		c.Stay()
		c.Migrate()
		c.TakeOver(next(), "", 0)
		c.Migrate()
		c.Hold() // the old one went first
		c.TakeOver(next(), "", 2)
		held, moving, other := start(), start(), start()
		held.Hold()
		held.Close(Ending{Reason: ResumeTimeout})
		moving.Migrate()
		moving.Close(Ending{Reason: ClientClosed})
		other.Close(Ending{Reason: Idle})

		got := gathered(t, r)
		for key, want := range map[string]float64{
			"resumes_total resumed a":           2,
			"resumes_total resume_timeout a":    1,
			"migrations_total moved a":          1,
			"migrations_total stayed a":         1,
			"migrations_total lost a":           1,
			"migrations_total client_closed a":  1,
			"replayed_messages_total a":         7,
			"held_seconds a":                    3,
			"state_seconds websocket held":      3,
			"state_seconds websocket migrating": 4,
			"active websocket a held":           0,
			"active websocket a migrating":      0,
			"active websocket a open":           1,
			"active websocket a closing":        3,
			"replay_bytes ":                     0,
		} {
			if g, ok := got[key]; !ok || g != want {
				t.Errorf("%s: got %v (there: %t), want %v", key, g, ok, want)
			}
		}
		for key := range got {
			if strings.HasPrefix(key, "resumes_total") && strings.Contains(key, "idle") || strings.Contains(key, "closed_total") {
				t.Errorf("got %q, want no such series", key)
			}
		}
		if sum := heldSum(t, r); sum != 4 {
			t.Errorf("got %v seconds held in all, want 4", sum)
		}
	})
}

// heldSum is the sum of held_seconds.
func heldSum(t *testing.T, r *Registry) (sum float64) {
	t.Helper()
	families, err := gatherer(t, r).Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "caddy_connections_held_seconds" {
			for _, m := range f.GetMetric() {
				sum += m.GetHistogram().GetSampleSum()
			}
		}
	}
	return sum
}

func TestGaugesAreZeroWhenAllAreDone(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	for i := range 60 {
		c := admit(t, r, route, new(owner))
		if i%3 > 0 {
			c.Attempt(choose(route, "app:80"), "app:80", c.accepted)
			open(c, new(owner), "")
		}
		if i%3 > 0 || i%2 == 0 {
			c.Close(Ending{Reason: Lifetime})
		}
		c.Done()
	}
	active := 0
	for key, v := range gathered(t, r) {
		if strings.HasPrefix(key, "active ") {
			if active++; v != 0 {
				t.Errorf("%s: got %v, want 0", key, v)
			}
		}
	}
	if active == 0 {
		t.Error("got no gauges: the test is void")
	}
	// A connection that was never open has not been closed.
	if got := gathered(t, r)["closed_total websocket lifetime a"]; got != 40 {
		t.Errorf("got %v closed, want the 40 that were open", got)
	}
}

func TestMetricsGoWithTheirRoute(t *testing.T) {
	r := New()
	gone, kept := r.Retain(WebSocket, "gone"), r.Retain(WebSocket, "kept")
	c := opened(t, r, gone, new(owner), "app:80")
	for _, route := range []*Route{gone, kept} {
		d := opened(t, r, route, new(owner), "app:80")
		d.Hold()
		d.TakeOver(choose(route, "app:81"), "app:81", 3)
		d.Migrate()
		d.TakeOver(choose(route, "app:80"), "app:80", 0)
		finish(d, Idle)
	}
	r.Release(gone)
	if gathered(t, r)["active websocket gone open"] != 1 {
		t.Error("got the series of a route deleted that has a connection")
	}
	c.Count(In, 1, 1)
	finish(c, Orphan)
	for key := range gathered(t, r) {
		if strings.Contains(key, "gone") {
			t.Errorf("got series %q of a route that is gone", key)
		}
	}
	for _, key := range []string{"closed_total websocket idle kept", "resumes_total resumed kept", "migrations_total moved kept", "held_seconds kept"} {
		if gathered(t, r)[key] != 1 {
			t.Errorf("got the series %q of another route deleted", key)
		}
	}
	if got := gathered(t, r)["replayed_messages_total kept"]; got != 3 {
		t.Errorf("got %v replayed on another route, want 3", got)
	}

	again := r.Retain(WebSocket, "gone")
	finish(opened(t, r, again, new(owner), "app:80"), Idle)
	if got := gathered(t, r)["closed_total websocket idle gone"]; got != 1 {
		t.Errorf("got %v closed on a route that came back, want to count anew", got)
	}
}

func TestMetricsAreWellFormed(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	c := opened(t, r, route, new(owner), "app:80")
	c.Hold()
	c.TakeOver(choose(route, "app:81"), "app:81", 3)
	c.Migrate()
	c.Stay()
	finish(c, Idle)
	route.Refused("no_upstream")
	families, err := gatherer(t, r).Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("got problems %v, error %v, want none", problems, err)
	}
	if a, b := gathered(t, r), gathered(t, r); len(a) != len(b) || len(a) < 17 {
		t.Errorf("got %d series in one config's registry and %d in the next, want the same", len(a), len(b))
	}
}

func TestCountingIsExactAndDoesNotAllocate(t *testing.T) {
	r := New()
	route := r.Retain(WebSocket, "a")
	c := opened(t, r, route, new(owner), "app:80")
	if n := testing.AllocsPerRun(100, func() { c.Count(In, 64, 1) }); n != 0 {
		t.Errorf("got %v allocations for each message, want none", n)
	}
	v := c.View()
	if got := gathered(t, r)["bytes_total in websocket a"]; got != float64(v.BytesIn) || v.BytesIn != 64*v.MessagesIn {
		t.Errorf("got %v bytes in metrics, %d in the view of %d messages", got, v.BytesIn, v.MessagesIn)
	}
}
