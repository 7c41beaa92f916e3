// This file tests what a pool shows of itself, its start and its end.

package pool

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestUpstreamsAreShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{names: []string{"d:80"}}
		r := newRig(t, []string{"wss://a", "{tenant}:80", "c:80"}, asks(s), checked(health.NewCheckers()), fails(3, time.Hour))
		r.net.set("a:443", true)
		r.net.set("d:80", true)
		pass(time.Minute)
		want := []registry.UpstreamState{
			{Key: "wss://a", Dial: "a:443", Healthy: false, MaxFails: 3},
			{Key: "{tenant}:80", Dial: "", Healthy: true, MaxFails: 3},
			{Key: "c:80", Dial: "c:80", Healthy: true, MaxFails: 3},
			{Key: "d:80", Dial: "d:80", Healthy: false, MaxFails: 3},
		}
		if got := r.pool.Upstreams(); !slices.Equal(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}

func TestWhichUpstreamsAreThePools(t *testing.T) {
	r := newRig(t, []string{"a:80", "{tenant}:80"})
	for key, want := range map[string]bool{
		"a:80": true, "b:80": false, "{tenant}:80": true, "{tenant}:80 one:80": true, "": false, "a:80 ": true,
	} {
		if got := r.pool.Has(key); got != want {
			t.Errorf("%q: got %t, want %t", key, got, want)
		}
	}
}

// An upstream's state is kept as long as one of the configs that have it.
func TestStateIsKeptOverAReload(t *testing.T) {
	old := newRig(t, abc[:2], fails(1, time.Hour))
	old.fail("a:80", 1)
	next := newRigOn(t, old.reg, old.route, old.net, abc[:1], fails(1, time.Hour))
	old.pool.Stop()
	next.want(next.open())
	next.pool.Stop()
	next.want(next.open(), "a:80")
}

func TestStartAndStopOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, abc[:1], fails(1, time.Hour), checked(health.NewCheckers()), leaves)
		r.pool.Start(r.route)
		r.pool.Start(r.route)
		synctest.Wait()
		if n := len(r.net.dialed()); n != 1 {
			t.Errorf("got %d probes, want 1", n)
		}
		r.fail("a:80", 1)
		r.pool.Stop()
		r.pool.Stop()
		r.want(r.open(), "a:80") // it is forgotten, so one Forget was enough
		r.pool.Start(r.route)
		pass(time.Hour)
		if n := len(r.net.dialed()); n != 0 {
			t.Errorf("got %d probes after Stop, want none", n)
		}

		never := New(Config{Upstreams: []Address{mustParse(t, "a:80")}, Policy: load(t, `{"policy":"first"}`), Connect: r.net.connect, Logger: zap.NewNop()})
		never.Stop()
		if target := never.Tries(r.route, client(), Opening, "").Next(t.Context()); target == nil {
			t.Error("got nothing from a pool that has not started, want a:80")
		}
	})
}

// Who is told of a change may do anything: nobody waits for it, and it may stop the
// pool.
func TestChangedMayTakeItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		running, over := make(chan struct{}), make(chan struct{})
		var r *rig
		r = newRig(t, abc[:2], checked(health.NewCheckers()), leaves, func(_ *rig, c *Config) {
			c.Changed = func(string, bool) {
				close(running)
				<-over
				r.pool.Stop()
			}
		})
		synctest.Wait()
		r.net.set("a:80", true)
		<-running
		elapsed(t, 0, func() {
			r.want(r.open(), "b:80")
			r.pool.Stop()
		})
		close(over)
	})
}
