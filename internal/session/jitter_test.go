// This file tests that what began together neither ends nor pings together.

package session

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// wantSpread checks that times fill the last 10 % before limit: each hundredth of
// limit has its share, and none has more than a quarter of all.
func wantSpread(t *testing.T, what string, times []time.Duration, limit time.Duration) {
	t.Helper()
	var share [10]int
	for _, d := range times {
		i := int((limit - d) / (limit / 100))
		if d > limit || i > 9 {
			t.Fatalf("%s: got %v, want 90 %% to 100 %% of %v", what, d, limit)
		}
		share[i]++
	}
	if slices.Min(share[:]) == 0 || slices.Max(share[:]) > len(times)/4 {
		t.Errorf("%s: got %v in the ten hundredths before %v, want them even", what, share, limit)
	}
}

func TestSessionsThatBeginTogetherEndAndPingApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, lifetime = 200, 10 * time.Minute
		s := defaults
		s.MaxLifetime = lifetime
		reg := registry.New()
		rigs := make([]*rig, n)
		for i := range rigs {
			rigs[i] = startIn(t, reg, setup{settings: s})
		}
		var lives, pings, backendPings []time.Duration
		for _, r := range rigs {
			r.wantEnd(2*lifetime, registry.Lifetime, "1001 end of lifetime", "1001")
			lives = append(lives, r.lasting)
			pings = append(pings, r.client.pings()[0].Sub(r.began))
			backendPings = append(backendPings, r.backend.pings()[0].Sub(r.began))
		}
		if got := reg.Len(); got != 0 {
			t.Errorf("got %d records left, want none", got)
		}
		wantSpread(t, "lifetime", lives, lifetime)
		wantSpread(t, "first ping to the client", pings, s.PingInterval)
		wantSpread(t, "first ping to the backend", backendPings, s.PingInterval)
	})
}

func TestSessionsThatLearnOfAShorterIntervalTogetherPingApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := registry.New()
		rigs := make([]*rig, 200)
		for i := range rigs {
			rigs[i] = startIn(t, reg, setup{settings: Settings{PingInterval: day, PingTimeout: time.Minute}})
		}
		time.Sleep(time.Hour)
		changed := time.Now()
		for _, r := range rigs {
			r.settings.Store(&defaults)
		}
		reg.ReconsiderAll(rigs[0].route)
		time.Sleep(time.Minute)
		synctest.Wait()
		var pings []time.Duration
		for _, r := range rigs {
			pings = append(pings, r.client.pings()[0].Sub(changed))
		}
		wantSpread(t, "first ping", pings, defaults.PingInterval)
	})
}

func TestARouteThatIsGoneEndsItsSessionsEvenly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, window = 200, 10 * time.Second
		reg := registry.New()
		rigs := make([]*rig, n)
		for i := range rigs {
			rigs[i] = startIn(t, reg, setup{})
		}
		began := time.Now()
		if got := reg.EndPaced(rigs[0].route, window, registry.Ending{Reason: registry.Orphan}); got != n {
			t.Errorf("got %d sessions planned, want %d", got, n)
		}
		var perSecond [10]int
		for _, r := range rigs {
			r.wantEnd(time.Minute, registry.Orphan, "1001 route removed", "1001")
			took := r.endedAt.Sub(began)
			if took <= 0 || took > window {
				t.Fatalf("got an end after %v, want it within %v", took, window)
			}
			perSecond[int((took-1)/time.Second)]++
		}
		for i, got := range perSecond {
			if got != n/10 {
				t.Errorf("got %d ends in second %d, want %d", got, i, n/10)
			}
		}
	})
}
