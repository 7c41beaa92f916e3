// This file tests passive health checks.

package pool

import (
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestFailuresMakeAnUpstreamUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:2], fails(2, 10*time.Second))
		r.fail("a:80", 1)
		r.want(r.open(), "a:80", "b:80")
		pass(6 * time.Second)
		r.fail("a:80", 1)
		r.want(r.open(), "b:80")
		pass(4 * time.Second) // the first one is forgotten
		r.want(r.open(), "a:80", "b:80")
		r.fail("a:80", 1)
		r.want(r.open(), "b:80")
		r.fail("a:80", 5)
		pass(10*time.Second - 1)
		r.want(r.open(), "b:80")
		pass(1)
		r.want(r.open(), "a:80", "b:80")
	})
}

func TestFailuresAreNotCountedUnlessTheyAreToBe(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	r := newRig(t, abc[:2], fails(1, 0), func(_ *rig, c *Config) { c.Logger = zap.New(core) })
	r.fail("a:80", 10)
	r.want(r.open(), "a:80", "b:80")
	if logs.Len() != 0 {
		t.Errorf("got logs %v, want none", logs.All())
	}
	for _, s := range r.pool.Upstreams() {
		if s.MaxFails != 0 {
			t.Errorf("%s: got MaxFails %d, want 0: none count", s.Key, s.MaxFails)
		}
	}
}

func TestWhatCountsAsAFailure(t *testing.T) {
	tests := map[string]struct {
		latency, took time.Duration
		err           error
		want          int
	}{
		"an error":               {0, time.Millisecond, errDown, 1},
		"an error that is slow":  {time.Second, time.Minute, errDown, 1},
		"success":                {0, time.Minute, nil, 0},
		"success in time":        {time.Second, time.Second - 1, nil, 0},
		"success that is slow":   {time.Second, time.Second, nil, 1},
		"success that is slower": {time.Second, time.Minute, nil, 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, abc[:1], fails(5, time.Hour), func(_ *rig, c *Config) { c.UnhealthyLatency = test.latency })
			target := r.open().Next(t.Context())
			r.pool.Tried(r.route, target, test.took, test.err)
			r.route.Loads(func(load func(string) registry.Load) {
				if got := load("a:80").Fails; got != test.want {
					t.Errorf("got %d failures, want %d", got, test.want)
				}
			})
		})
	}
}

// Live connections are told once of each time that an upstream fails too often.
func TestLeftIsCalledOncePerCrossing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:2], fails(2, 10*time.Second), leaves)
		check := func(lefts int, leaves bool) {
			t.Helper()
			synctest.Wait()
			if got := r.lefts(); got != lefts {
				t.Errorf("got %d calls of Left, want %d", got, lefts)
			}
			if got := r.pool.Leaves(r.route, "a:80"); got != leaves {
				t.Errorf("Leaves: got %t, want %t", got, leaves)
			}
		}
		r.fail("a:80", 1)
		check(0, false)
		r.fail("a:80", 1)
		check(1, true)
		r.fail("a:80", 3)
		check(1, true)
		pass(10 * time.Second)
		check(1, false)
		r.fail("a:80", 2)
		check(2, true)
		if r.pool.Leaves(r.route, "b:80") {
			t.Error("got another upstream left, want only the one that failed")
		}
	})
}

func TestNobodyLeavesFailedUpstreamsUnlessTheyAreTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:2], fails(1, time.Hour))
		r.fail("a:80", 3)
		synctest.Wait()
		if r.lefts() != 0 || r.pool.Leaves(r.route, "a:80") {
			t.Errorf("got %d calls of Left and Leaves %t, want none and false", r.lefts(), r.pool.Leaves(r.route, "a:80"))
		}
		r.drain("a:80", true)
		if !r.pool.Leaves(r.route, "a:80") {
			t.Error("got a drained upstream not left")
		}
	})
}

// Failures of an address that placeholders made are its own.
func TestFailuresOfAddressesOfPlaceholders(t *testing.T) {
	r := newRig(t, []string{"{tenant}:80"}, fails(1, time.Hour), leaves)
	one := r.openAs("one", nil).Next(t.Context())
	r.pool.Failed(r.route, one.Place)
	if next := r.openAs("one", nil).Next(t.Context()); next != nil {
		t.Errorf("got %s, want nothing", next.Place.Key())
	}
	if next := r.openAs("two", nil).Next(t.Context()); next == nil {
		t.Error("got nothing, want another address")
	}
	if !r.pool.Leaves(r.route, one.Place.Key()) || r.pool.Leaves(r.route, "{tenant}:80 two:80") {
		t.Error("got other addresses left than the one that failed")
	}
}
