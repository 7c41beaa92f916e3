// This file tests that policies see what is set, and what happens if they cannot.

package selection

import (
	"runtime/debug"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

func TestThisCaddyVersionIsSupported(t *testing.T) {
	if CanShowState() {
		return
	}
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			if m.Path == "github.com/caddyserver/caddy/v2" {
				version = m.Version
			}
		}
	}
	t.Fatalf("got no way to show policies their upstreams' state with Caddy %s: reverseproxy.Host or Upstream has changed", version)
}

func TestStateIsTheUpstreamsOwn(t *testing.T) {
	a, b := NewUpstream("a:1"), NewUpstream("b:1")
	a.state.set(7, false)
	if got := a.theirs; got.NumRequests() != 7 || got.Healthy() || got.Available() || got.Fails() != 0 || got.Dial != "a:1" || got.MaxRequests != 0 {
		t.Errorf("got %+v, want 7 requests and unavailable, and nothing else", got)
	}
	if got := b.theirs; got.NumRequests() != 0 || !got.Available() {
		t.Errorf("got %d requests, available %v at another upstream, want 0, true", got.NumRequests(), got.Available())
	}
	a.state.set(0, true)
	if got := a.theirs; got.NumRequests() != 0 || !got.Available() {
		t.Errorf("got %d requests, available %v, want 0, true", got.NumRequests(), got.Available())
	}
}

// Fields as a version of Caddy could have them.
type (
	same  struct{ Before, Unhealthy atomic.Int32 }
	inner struct{ Unhealthy atomic.Int32 }
)

func TestOffsetOf(t *testing.T) {
	if got, ok := offsetOf[same, atomic.Int32]("Unhealthy"); got != 4 || !ok {
		t.Errorf("got offset %d, %v, want 4, true", got, ok)
	}
	for name, got := range map[string]bool{
		"gone":            second(offsetOf[same, atomic.Int32]("Healthy")),
		"of another type": second(offsetOf[same, atomic.Int64]("Unhealthy")),
		// Its offset is in inner: writing there would be writing anywhere.
		"of an embedded pointer": second(offsetOf[struct{ *inner }, atomic.Int32]("Unhealthy")),
		"of an embedded struct":  second(offsetOf[struct{ inner }, atomic.Int32]("Unhealthy")),
	} {
		if got {
			t.Errorf("a field that is %s: got found, want not", name)
		}
	}
}

func second(_ uintptr, ok bool) bool { return ok }

// Without state, a policy gets the available upstreams only.
func TestBlindPolicyGetsTheAvailable(t *testing.T) {
	r := newBlindRig(t, `{"policy":"test_probe"}`, 4)
	r.candidates[0].Available, r.candidates[2].Available = false, false
	r.candidates[1].Conns = 5
	r.policy.selector.(*probe).choose = func(v view) int {
		want := reverseproxy.UpstreamPool{r.candidates[1].theirs, r.candidates[3].theirs}
		if !slices.Equal(v.pool, want) || v.pool[0].NumRequests() != 0 {
			t.Errorf("got pool %v, want %v", v.pool, want)
		}
		v.w.Header().Set("A", "b")
		return 1
	}
	if i, header := r.connect(request("/")); i != 3 || len(header) != 1 {
		t.Errorf("got upstream %d and header %v, want 3 and one", i, header)
	}
}

func TestBlindCountsAtTopLevel(t *testing.T) {
	for name, c := range map[string]struct {
		raw  string
		upTo int
	}{
		"unset":                      {``, 1},
		"least_conn":                 {`{"policy":"least_conn"}`, 1},
		"random_choose":              {`{"policy":"random_choose"}`, 30},
		"random_choose more than is": {`{"policy":"random_choose","choose":9}`, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newBlindRig(t, c.raw, 3)
			if got := spread(r.connections(1000)); got > c.upTo {
				t.Errorf("got counts %v, want them within %d", r.counts(), c.upTo)
			}
		})
	}
}

// The others do without state what they do with it, as long as all are available.
func TestBlindOthers(t *testing.T) {
	r := newBlindRig(t, `{"policy":"weighted_round_robin","weights":[6,1,3]}`, 3)
	r.connections(1000)
	r.want(600, 100, 300)
	r = newBlindRig(t, `{"policy":"cookie"}`, 3)
	home, header := r.connect(request("/"))
	back := request("/")
	back.AddCookie(cookieOf(t, header))
	if i, header := r.connect(back); i != home || header != nil {
		t.Errorf("got upstream %d and header %v, want %d and none", i, header, home)
	}
}
