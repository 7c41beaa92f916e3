// This file tests the regular look at all records.

package registry

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// broken is an owner whose connection never ends.
type broken struct {
	owner
	panics bool
}

func (b *broken) Abort() {
	b.owner.Abort()
	if b.panics {
		panic("broken")
	}
}

// A record whose owner does not end it is cut, counted and then removed, and all it
// counted towards is given back once, also if its owner panics and comes back at last.
func TestForgottenRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, n := New(), new(noticed)
		r.SetLimits(Limits{Connections: new(3), PerIP: new(3)}, 0)
		r.SetWatch(Watch{Pressure: 100, Notices: n})
		defer r.sweeper.Stop()
		route := r.Retain(WebSocket, "a")
		closing, dialing := &broken{panics: true}, &broken{}
		c := opened(t, r, route, closing, "app:80")
		d := admit(t, r, route, dialing)
		d.Attempt(choose(route, "app:80"), "app:80", time.Now().Add(10*time.Second))
		live := opened(t, r, route, new(owner), "app:80")
		n.want(t, "pressure true at 3 of 3")
		c.Close(Ending{Reason: Admin})
		time.Sleep(ClosingTimeout + lateAfter - time.Second)
		n.want(t)
		time.Sleep(sweepPeriod)
		n.want(t, "forgotten "+c.ID()+" closing false")
		time.Sleep(sweepPeriod)
		n.want(t, "forgotten "+c.ID()+" closing true", "pressure false at 2 of 3", "forgotten "+d.ID()+" connecting false")
		time.Sleep(sweepPeriod)
		n.want(t, "forgotten "+d.ID()+" connecting true")
		for _, b := range []*broken{closing, dialing} {
			if _, aborts, _ := b.counts(); aborts != 1 {
				t.Errorf("got %d cuts, want one", aborts)
			}
		}
		c.Done()
		d.Close(Ending{Reason: Admin})
		d.Done()
		if got := r.Len(); got != 1 || r.counted != 1 || placed(route, "app:80") != 1 {
			t.Errorf("got %d records, %d counted, %d at the upstream; want the live one", got, r.counted, placed(route, "app:80"))
		}
		if got := testutil.ToFloat64(r.metrics.sweeperFound); got != 2 {
			t.Errorf("sweeper_found_total: got %v, want 2", got)
		}
		finish(live, Idle)
		wantNothingCounted(t, r)
	})
}

// What waits without a deadline, or has been answered, is not forgotten.
func TestSweepLeavesOthersAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, n := New(), new(noticed)
		r.SetWatch(Watch{Notices: n})
		defer r.sweeper.Stop()
		route := r.Retain(WebSocket, "a")
		waits := admit(t, r, route, new(owner))
		waits.Attempt(choose(route, "app:80"), "app:80", time.Now().Add(time.Second))
		waits.Attempted()
		for _, s := range []State{Open, Held, Migrating, HalfOpen} {
			force(t, admit(t, r, route, new(owner)), s)
		}
		time.Sleep(time.Hour)
		n.want(t)
		if got := testutil.ToFloat64(r.metrics.sweeperFound); got != 0 || r.Len() != 5 {
			t.Errorf("got %v found and %d left, want none and 5", got, r.Len())
		}
	})
}

// An old connection is told of once, soon after it has got old; another limit counts
// from the next sweep on.
func TestLongLived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, n := New(), new(noticed)
		r.SetWatch(Watch{LongLived: time.Hour, Notices: n})
		defer r.sweeper.Stop()
		route := r.Retain(WebSocket, "a")
		first := opened(t, r, route, new(owner), "app:80")
		time.Sleep(time.Hour - time.Millisecond)
		n.want(t)
		time.Sleep(sweepPeriod + time.Millisecond)
		n.want(t, "old "+first.ID())
		second := opened(t, r, route, new(owner), "app:80")
		time.Sleep(10 * time.Minute)
		n.want(t)
		r.SetWatch(Watch{LongLived: time.Second, Notices: n})
		time.Sleep(time.Second)
		synctest.Wait()
		n.want(t, "old "+second.ID())
		third := opened(t, r, route, new(owner), "app:80")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		n.want(t, "old "+third.ID())
		r.SetWatch(Watch{Notices: n})
		opened(t, r, route, new(owner), "app:80")
		time.Sleep(time.Hour)
		n.want(t)
	})
}

// Reloads that follow each other sooner than sweeps do not put these off.
func TestSweepsAreNotPutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, n := New(), new(noticed)
		w := Watch{LongLived: time.Hour, Notices: n}
		r.SetWatch(w)
		defer r.sweeper.Stop()
		c := opened(t, r, r.Retain(WebSocket, "a"), new(owner), "app:80")
		for began := time.Now(); time.Since(began) < time.Hour+sweepPeriod; time.Sleep(sweepPeriod / 5) {
			r.SetWatch(w)
		}
		n.want(t, "old "+c.ID())
	})
}
