// This file tests active health checks as a pool makes them.

package pool

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestUnhealthyUpstreamsAreNotChosen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:2], checked(health.NewCheckers()))
		synctest.Wait()
		r.net.set("a:80", true)
		r.want(r.open(), "a:80", "b:80") // nobody knows yet
		pass(time.Minute)
		r.want(r.open(), "b:80")
		if got := r.changed(); !slices.Equal(got, []string{"a:80 false"}) {
			t.Errorf("got changes %q, want a:80 to be unhealthy", got)
		}
		if r.pool.Leaves(r.route, "a:80") {
			t.Error("got live connections leave, want them to stay")
		}
		r.net.set("a:80", false)
		pass(time.Minute)
		r.want(r.open(), "a:80", "b:80")
		if got := r.changed(); !slices.Equal(got, []string{"a:80 true"}) {
			t.Errorf("got changes %q, want a:80 to be healthy", got)
		}
		if got := r.lefts(); got != 0 {
			t.Errorf("got %d calls of Left, want none: nobody is to leave", got)
		}
	})
}

func TestLiveConnectionsLeaveUnhealthyUpstreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:2], checked(health.NewCheckers()), leaves)
		r.net.set("a:80", true)
		pass(time.Minute)
		if r.lefts() != 1 || !r.pool.Leaves(r.route, "a:80") || r.pool.Leaves(r.route, "b:80") {
			t.Errorf("got %d calls of Left and Leaves %t and %t, want 1, true and false",
				r.lefts(), r.pool.Leaves(r.route, "a:80"), r.pool.Leaves(r.route, "b:80"))
		}
		if r.pool.Others(r.route, "b:80") || !r.pool.Others(r.route, "a:80") {
			t.Error("got an unhealthy upstream taken for another one to go to")
		}
		r.net.set("a:80", false)
		pass(time.Minute)
		if r.lefts() != 2 || r.pool.Leaves(r.route, "a:80") { // what was planned is lifted
			t.Errorf("got %d calls of Left and Leaves %t, want 2 and false", r.lefts(), r.pool.Leaves(r.route, "a:80"))
		}
	})
}

func TestWhatIsProbed(t *testing.T) {
	tests := map[string]struct{ upstream, host string }{
		"a host":   {"app:8080", "app:8080"},
		"a URL":    {"wss://app", "app:443"},
		"IPv6":     {"[::1]:80", "[::1]:80"},
		"a socket": {"unix//run/app.sock", "/run/app.sock"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{test.upstream}, checked(health.NewCheckers()))
				synctest.Wait()
				if len(r.net.targets) != 1 || r.net.targets[0].Host != test.host {
					t.Fatalf("got targets %v, want one with host %q", r.net.targets, test.host)
				}
				r.net.dialed()
				if _, err := r.net.targets[0].Dial(t.Context(), "81"); err != nil {
					t.Fatal(err)
				}
				want := dial{mustParse(t, test.upstream), "81", netip.AddrPort{}}
				if got := r.net.dialed(); len(got) != 1 || got[0] != want {
					t.Errorf("got dials %v, want %v", got, want)
				}
			})
		})
	}
}

func TestPlaceholdersAreNotProbed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"{tenant}:80"}, checked(health.NewCheckers()))
		pass(time.Hour)
		if got := r.net.dialed(); len(got) != 0 {
			t.Errorf("got dials %v, want none", got)
		}
		r.want(r.openAs("one", nil), "{tenant}:80 one:80")
	})
}

// Two configs that have the same checks of the same upstream share its state, so
// that a reload keeps it; what differs in the outcome is checked apart.
func TestWhichChecksAreShared(t *testing.T) {
	tests := map[string]struct {
		other  string
		key    string
		shared bool
	}{
		"the same":                  {"a:80", "check", true},
		"another address":           {"b:80", "check", false},
		"other checks":              {"a:80", "other", false},
		"with TLS":                  {"wss://a:80", "check", false},
		"without TLS for certain":   {"ws://a:80", "check", false},
		"a network of its own":      {"tcp4/a:80", "check", false},
		"the same in other letters": {"tcp/a:80", "check", true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				checkers := health.NewCheckers()
				old := newRig(t, []string{"a:80"}, checked(checkers))
				old.net.set("a:80", true)
				pass(time.Minute)
				// The next config's backends are up, so it knows of none that is
				// not, unless it was told.
				next := newRigOn(t, old.reg, old.route, new(network), []string{test.other}, checked(checkers),
					func(_ *rig, c *Config) { c.Checks.Key = test.key })
				synctest.Wait()
				if got := !next.pool.Upstreams()[0].Healthy; got != test.shared {
					t.Errorf("got the state shared: %t, want %t", got, test.shared)
				}
			})
		})
	}
}

// A probe that hangs holds up neither Start nor clients, and Stop breaks it off.
func TestAProbeThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := registry.New()
		n := &network{hanging: true}
		elapsed(t, 0, func() {
			r := newRigOn(t, reg, reg.Retain(registry.WebSocket, "route"), n, abc, checked(health.NewCheckers()))
			synctest.Wait()
			if got := len(n.dialed()); got != 3 {
				t.Errorf("got %d probes at once, want 3", got)
			}
			r.want(r.open(), abc...)
			r.pool.Stop()
			synctest.Wait() // the goroutines end, or synctest complains
		})
	})
}

// Nothing is told of a pool that has stopped.
func TestStopEndsChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc, checked(health.NewCheckers()), leaves)
		synctest.Wait()
		r.pool.Stop()
		r.net.dialed()
		r.net.set("a:80", true)
		pass(time.Hour)
		if got := r.net.dialed(); len(got) != 0 || len(r.changed()) != 0 || r.lefts() != 0 {
			t.Errorf("got %d probes and %d calls of Left after Stop, want none", len(got), r.lefts())
		}
	})
}
