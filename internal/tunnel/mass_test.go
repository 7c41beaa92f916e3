package tunnel

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// C64: tunnels that became inactive at one instant are warned of at that instant, once
// each, and closed evenly over a tenth of the grace.
func TestMassInactivityIsSpread(t *testing.T) {
	const tunnels, grace = 1000, 10 * time.Minute
	synctest.Test(t, func(t *testing.T) {
		set := Settings{InactivityTimeout: 4 * time.Hour, InactivityGrace: grace}
		all := make([]*rig, tunnels)
		for i := range all {
			all[i], _, _ = memRig(t, set, 100)
		}
		due := time.Now().Add(set.InactivityTimeout + grace)
		var after []time.Duration
		for _, r := range all {
			r.wantEndAfter(due, 0, grace/10, registry.Idle)
			r.wantWarnings(1)
			after = append(after, r.decided.Sub(due))
		}
		slices.Sort(after)
		for from := time.Duration(0); from < grace/10; from += grace / 100 {
			to := from + grace/100
			n := 0
			for _, d := range after {
				if d >= from && d < to {
					n++
				}
			}
			if n < tunnels/20 || n > tunnels/5 { // five standard deviations
				t.Errorf("from %v to %v: got %d closed, want about %d", from, to, n, tunnels/10)
			}
		}
	})
}
