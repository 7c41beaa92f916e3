// This file tests the way of a new connection through the pool.

package pool

import (
	"context"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

var abc = []string{"a:80", "b:80", "c:80"}

func TestEveryAvailableUpstreamIsTriedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc)
		elapsed(t, 0, func() { r.want(r.open(), "a:80", "b:80", "c:80") })
		r.drain("b:80", true)
		elapsed(t, 0, func() { r.want(r.open(), "a:80", "c:80") })
		r.drain("b:80", false)
		r.want(r.open(), "a:80", "b:80", "c:80")
	})
}

// When all were tried and there are retries left, there is a pause.
func TestRetriesAreAttemptsAfterTheFirst(t *testing.T) {
	tests := map[string]struct {
		retries int
		want    []string
		after   time.Duration
	}{
		"none":                      {0, []string{"a:80"}, 0},
		"one":                       {1, []string{"a:80", "b:80"}, 0},
		"as many as there are":      {2, []string{"a:80", "b:80", "c:80"}, 0},
		"more: from the start":      {4, []string{"a:80", "b:80", "c:80", "a:80", "b:80"}, 250 * time.Millisecond},
		"more than twice the round": {6, []string{"a:80", "b:80", "c:80", "a:80", "b:80", "c:80", "a:80"}, 500 * time.Millisecond},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, abc, retries(test.retries))
				elapsed(t, test.after, func() { r.want(r.open(), test.want...) })
			})
		})
	}
}

// Whatever keeps all upstreams from new connections, a client does not wait if it
// is not to.
func TestNoneAvailable(t *testing.T) {
	states := map[string]func(r *rig){
		"all are full":     func(r *rig) { r.connect(); r.connect() },
		"all are drained":  func(r *rig) { r.drain("a:80", true); r.drain("b:80", true) },
		"all have failed":  func(r *rig) { r.fail("a:80", 2); r.fail("b:80", 2) },
		"all probes fail":  func(r *rig) { r.net.set("a:80", true); r.net.set("b:80", true); pass(2 * time.Minute) },
		"each for its own": func(r *rig) { r.drain("a:80", true); r.fail("b:80", 2) },
	}
	for name, bring := range states {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, abc[:2], full(1), fails(2, time.Hour), retries(5), checked(health.NewCheckers()))
				bring(r)
				elapsed(t, 0, func() { r.want(r.open()) })
			})
		})
	}
}

// Waiting is no attempt. A pause that would end too late is not begun.
func TestTryDurationWaitsForAnUpstream(t *testing.T) {
	tests := map[string]struct {
		duration time.Duration
		want     []string
		after    time.Duration
	}{
		"one comes back":            {5 * time.Second, []string{"b:80"}, 2 * time.Second},
		"one comes back at the end": {2 * time.Second, []string{"b:80"}, 2 * time.Second},
		"none comes back":           {time.Second, nil, time.Second},
		"shorter than the interval": {100 * time.Millisecond, nil, 0},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, abc[:2], fails(1, 2*time.Second), waits(test.duration), retries(0))
				r.drain("a:80", true)
				r.fail("b:80", 1)
				elapsed(t, test.after, func() { r.want(r.open(), test.want...) })
			})
		})
	}
}

func TestTryDurationTriesAgain(t *testing.T) {
	a, b := "a:80", "b:80"
	tests := map[string]struct {
		options []option
		want    []string
		after   time.Duration
	}{
		"round after round":             {[]option{waits(600 * time.Millisecond)}, []string{a, b, a, b, a, b}, 500 * time.Millisecond},
		"shorter than the interval":     {[]option{waits(100 * time.Millisecond)}, []string{a, b}, 0},
		"until there are no retries":    {[]option{waits(time.Minute), retries(2)}, []string{a, b, a}, 250 * time.Millisecond},
		"retries for longer than there": {[]option{waits(300 * time.Millisecond), retries(9)}, []string{a, b, a, b}, 250 * time.Millisecond},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, abc[:2], test.options...)
				elapsed(t, test.after, func() { r.want(r.open(), test.want...) })
			})
		})
	}
}

func TestAClientThatGoesAwayWaitsNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:1], waits(time.Hour))
		r.drain("a:80", true)
		ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
		defer cancel()
		elapsed(t, 900*time.Millisecond, func() {
			if target := r.open().Next(ctx); target != nil {
				t.Errorf("got %s, want nothing", target.Place.Key())
			}
		})
	})
}

func TestATargetTakesAPlace(t *testing.T) {
	r := newRig(t, abc[:1], full(1))
	tries := r.open()
	target := tries.Next(t.Context())
	if n := r.conns("a:80"); target == nil || n != 1 {
		t.Fatalf("got target %v and %d places taken, want 1", target, n)
	}
	r.want(r.open()) // it is full
	if target := tries.Next(t.Context()); target != nil {
		t.Errorf("got %s again, want nothing", target.Place.Key())
	}
	if n := r.conns("a:80"); n != 1 {
		t.Errorf("got %d places taken by who got nothing, want the 1 from before", n)
	}
	r.route.Leave(target.Place)
	if n := r.conns("a:80"); n != 0 {
		t.Errorf("got %d places taken after it was given back, want 0", n)
	}
	r.want(r.open(), "a:80")
}

// No burst gets more connections to an upstream than it may have, and none is
// turned away while there is room.
func TestMaxConnectionsIsExact(t *testing.T) {
	r := newRig(t, abc, full(20), policy(`{"policy":"random"}`))
	var got, none atomic.Int32
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			if r.open().Next(t.Context()) == nil {
				none.Add(1)
			} else {
				got.Add(1)
			}
		})
	}
	all.Wait()
	if got.Load() != 60 || none.Load() != 140 {
		t.Errorf("got %d connections and %d refused, want 60 and 140", got.Load(), none.Load())
	}
	for _, key := range abc {
		if n := r.conns(key); n != 20 {
			t.Errorf("%s: got %d connections, want 20", key, n)
		}
	}
}

// Connections that come at once are counted one after the other.
func TestPoliciesCountConnections(t *testing.T) {
	r := newRig(t, abc, policy(`{"policy":"least_conn"}`))
	var all sync.WaitGroup
	for range 90 {
		all.Go(func() { r.open().Next(t.Context()) })
	}
	all.Wait()
	for _, key := range abc {
		if n := r.conns(key); n != 30 {
			t.Errorf("%s: got %d connections, want 30", key, n)
		}
	}
}

func TestThePolicysHeaderIsTheTargets(t *testing.T) {
	r := newRig(t, abc, policy(`{"policy":"cookie","name":"lb"}`))
	first := r.open().Next(t.Context())
	cookies := (&http.Response{Header: first.Header}).Cookies()
	if len(cookies) != 1 || cookies[0].Name != "lb" {
		t.Fatalf("got header %v, want a cookie", first.Header)
	}
	for range 10 {
		c := client()
		c.Request.AddCookie(cookies[0])
		again := r.pool.Tries(r.route, c, Opening, "").Next(t.Context())
		if again.Place.Key() != first.Place.Key() || again.Header != nil {
			t.Fatalf("got %s with header %v, want %s without", again.Place.Key(), again.Header, first.Place.Key())
		}
	}
	// A fallback of the policy's is told to the client with its own answer.
	c := client()
	c.Request.AddCookie(cookies[0])
	tries := r.pool.Tries(r.route, c, Opening, "")
	tries.Next(t.Context())
	second := tries.Next(t.Context())
	if second.Place.Key() == first.Place.Key() || len(second.Header["Set-Cookie"]) != 1 {
		t.Errorf("got %s with header %v, want another one with one cookie", second.Place.Key(), second.Header)
	}
}

// A policy may choose none although some are available.
func TestAPolicyThatChoosesNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc, policy(`{"policy":"pooltest_none"}`), retries(3))
		elapsed(t, 0, func() {
			r.want(r.open())
			r.want(r.resume("a:80"))
			r.want(r.move("a:80"))
		})
		for _, key := range abc {
			if n := r.conns(key); n != 0 {
				t.Errorf("%s: got %d places taken, want none", key, n)
			}
		}
	})
}

func TestDialsAreForTheClient(t *testing.T) {
	r := newRig(t, []string{"wss://a"})
	target := r.open().Next(t.Context())
	if _, err := target.Dial(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := dial{target.Addr, "", netip.MustParseAddrPort("192.0.2.1:1234")}
	if got := r.net.dialed(); len(got) != 1 || got[0] != want || target.Addr.Dial() != "a:443" {
		t.Errorf("got dials %v, want %v", got, want)
	}
	r.net.set("a:443", true)
	if _, err := target.Dial(t.Context()); err != errDown {
		t.Errorf("got error %v, want %v", err, errDown)
	}
}

// Each address that placeholders make is an upstream of its own, and goes with its
// last connection.
func TestAddressesOfPlaceholders(t *testing.T) {
	r := newRig(t, []string{"{tenant}:80", "b:80"}, full(1))
	for _, tenant := range []string{"one", "two"} {
		target := r.openAs(tenant, nil).Next(t.Context())
		key := registry.UpstreamKey("{tenant}:80", tenant+":80")
		if target.Place.Key() != key || target.Place.Name() != "{tenant}:80" || target.Addr.Dial() != tenant+":80" {
			t.Fatalf("got %q at %s, want %q", target.Place.Key(), target.Addr.Dial(), key)
		}
		if n := r.conns(key); n != 1 {
			t.Errorf("%s: got %d connections, want 1", key, n)
		}
		r.want(r.openAs(tenant, nil), "b:80") // it is full
	}
}

// What placeholders stood for when the connection was opened counts for all its
// life, when their values may be gone.
func TestAddressesOfPlaceholdersAreKept(t *testing.T) {
	r := newRig(t, []string{"{tenant}:80", "b:80", "{other}:81"})
	addresses := r.pool.Expand(func(s string) string {
		return strings.NewReplacer("{tenant}", "one", "{other}", "not/good").Replace(s)
	})
	if got := addresses["{tenant}:80"]; len(addresses) != 1 || got.Dial() != "one:80" {
		t.Fatalf("got addresses %v, want that of the tenant", addresses)
	}
	if got := newRig(t, abc).pool.Expand(nil); got != nil {
		t.Errorf("got addresses %v of a pool without placeholders, want none", got)
	}
	target := r.openAs("", addresses).Next(t.Context())
	if target.Addr.Dial() != "one:80" {
		t.Fatalf("got %q, want what was known", target.Addr.Dial())
	}
	if _, err := target.Dial(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// An address that cannot be made is like one that cannot be reached: the next one
// is tried.
func TestAddressesThatPlaceholdersDoNotMake(t *testing.T) {
	r := newRig(t, []string{"{tenant}:80", "b:80"})
	tries := r.openAs("", nil)
	target := tries.Next(t.Context())
	if target.Place.Name() != "{tenant}:80" {
		t.Fatalf("got %q, want the one with placeholders", target.Place.Name())
	}
	if _, err := target.Dial(t.Context()); err == nil || !strings.Contains(err.Error(), "no host") {
		t.Errorf("got error %v, want one that says no host", err)
	}
	if got := r.net.dialed(); got != nil {
		t.Errorf("got dials %v, want none", got)
	}
	if next := tries.Next(t.Context()); next == nil || next.Place.Key() != "b:80" {
		t.Errorf("got %v, want b:80", next)
	}
	if next := tries.Next(t.Context()); next != nil {
		t.Errorf("got %v, want nothing", next)
	}
}

// openAs is open for a client of a tenant.
func (r *rig) openAs(tenant string, addresses map[string]Address) *Tries {
	c := client()
	c.Replace = func(s string) string { return strings.ReplaceAll(s, "{tenant}", tenant) }
	c.Addresses = addresses
	return r.pool.Tries(r.route, c, Opening, "")
}

func init() { caddy.RegisterModule(none{}) }

// none is a policy that chooses none.
type none struct{}

func (none) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.selection_policies.pooltest_none",
		New: func() caddy.Module { return new(none) },
	}
}

func (none) Select(reverseproxy.UpstreamPool, *http.Request, http.ResponseWriter) *reverseproxy.Upstream {
	return nil
}
