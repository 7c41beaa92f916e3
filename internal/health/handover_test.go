// This file tests checks that several users share, as two configs do during a reload.

package health

import (
	"context"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestWhoJoinsFindsTheState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.setDown(true)
		var first, second told
		a := c.Watch("a", p.spec(), first.notify)
		pass(time.Second)
		b := c.Watch("a", p.spec(), second.notify)
		if b.Healthy() {
			t.Error("who joined found the upstream healthy")
		}
		pass(5 * time.Second)
		if _, n := p.begins(); n != 1 {
			t.Errorf("got %d probes, want no new one for who joined", n)
		}
		p.setDown(false)
		pass(5 * time.Second)
		if first.String() != "[false true]" || second.String() != "[true]" {
			t.Errorf("told %s and %s, want each its changes", &first, &second)
		}
		a.Stop()
		p.setDown(true)
		pass(10 * time.Second)
		b.Stop()
		if first.String() != "[false true]" || second.String() != "[true false]" {
			t.Errorf("told %s and %s, want no change after Stop", &first, &second)
		}
		synctest.Wait()
		leftovers(t, c)
	})
}

func TestOtherKeysAreOtherChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, up, down := NewCheckers(), newProber(), newProber()
		down.setDown(true)
		a, b := c.Watch("a", up.spec(), nil), c.Watch("b", down.spec(), nil)
		pass(0)
		if !a.Healthy() || b.Healthy() {
			t.Errorf("got healthy %t and %t, want only the first", a.Healthy(), b.Healthy())
		}
		a.Stop()
		b.Stop()
	})
}

// State and streaks survive as long as somebody watches.
func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.setDown(true)
		s := p.spec()
		s.Fails = 4
		w := c.Watch("a", s, nil)
		pass(0)
		for range 3 {
			next := c.Watch("a", s, nil)
			w.Stop()
			w = next
			if !w.Healthy() {
				t.Fatal("got unhealthy too soon")
			}
			pass(10 * time.Second)
		}
		if _, n := p.begins(); w.Healthy() || n != 4 {
			t.Errorf("after %d probes that failed: got healthy %t, want unhealthy after 4", n, w.Healthy())
		}
		next := c.Watch("a", s, nil)
		w.Stop()
		if next.Healthy() {
			t.Error("the next found the upstream healthy")
		}
		next.Stop()
	})
}

func TestNewestSpecCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, old, young := NewCheckers(), newProber(), newProber()
		oldCore, oldLogs := observer.New(zapcore.InfoLevel)
		youngCore, youngLogs := observer.New(zapcore.InfoLevel)
		s := old.spec()
		s.Interval, s.Fails, s.Logger = time.Minute, 5, zap.New(oldCore)
		a := c.Watch("a", s, nil)
		pass(5 * time.Second)

		// A shorter interval, which is over already: a probe at once, of the new one.
		s = young.spec()
		s.Interval, s.Fails, s.Logger = time.Second, 2, zap.New(youngCore)
		young.setDown(true)
		b := c.Watch("a", s, nil)
		pass(0)
		if begins, _ := young.begins(); !slices.Equal(begins, []time.Duration{5 * time.Second}) {
			t.Errorf("got probes at %v, want one at once", begins)
		}
		pass(time.Second)
		if a.Healthy() {
			t.Error("got healthy after as many fails as the newest wants")
		}

		// The older one counts again.
		b.Stop()
		old.setDown(false)
		_, before := young.begins()
		pass(54 * time.Second)
		if _, n := old.begins(); n > 2 || a.Healthy() != (n == 2) {
			t.Errorf("got %d probes of the older one, healthy %t", n, a.Healthy())
		}
		pass(7 * time.Second)
		if _, n := old.begins(); n != 2 || !a.Healthy() {
			t.Errorf("got %d probes of the older one, healthy %t; want one more, and healthy", n, a.Healthy())
		}
		if _, n := young.begins(); n != before {
			t.Errorf("got %d probes of the one that stopped, want none after the %d before", n, before)
		}
		if oldLogs.Len() != 1 || youngLogs.Len() != 1 {
			t.Errorf("got %d and %d log entries, want a change with the logger that counted then", oldLogs.Len(), youngLogs.Len())
		}

		// An older one that stops changes nothing.
		d := c.Watch("a", young.spec(), nil)
		_, before = young.begins()
		a.Stop()
		pass(time.Minute)
		if _, n := young.begins(); n < before+5 || n > before+7 {
			t.Errorf("got %d probes in a minute, want about 6", n-before)
		}
		d.Stop()
	})
}

// A longer interval puts off what was due.
func TestIntervalGrowsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		a := c.Watch("a", p.spec(), nil)
		pass(5 * time.Second)
		s := p.spec()
		s.Interval = time.Hour
		b := c.Watch("a", s, nil)
		pass(45 * time.Minute)
		if _, n := p.begins(); n != 1 {
			t.Errorf("got %d probes, want the interval to have grown", n)
		}
		a.Stop()
		b.Stop()
	})
}

// A probe whose Watch stops is nobody's failure: it begins again for who is left.
func TestStopDuringAProbe(t *testing.T) {
	for _, newest := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c, hanging, other, n := NewCheckers(), newProber(), newProber(), new(told)
			hanging.takes = time.Hour
			var probing, left *Watch
			if newest {
				left = c.Watch("a", other.spec(), n.notify)
				pass(9 * time.Second)
				probing = c.Watch("a", hanging.spec(), n.notify)
				pass(time.Second)
				probing.Hurry()
			} else { // the usual reload
				probing = c.Watch("a", hanging.spec(), n.notify)
				pass(time.Second)
				left = c.Watch("a", other.spec(), n.notify)
			}
			pass(time.Second)
			_, before := other.begins()
			probing.Stop()
			pass(0)
			if hanging.canceled != 1 {
				t.Errorf("newest %t: got %d probes canceled, want the one under way", newest, hanging.canceled)
			}
			if _, now := other.begins(); now != before+1 {
				t.Errorf("newest %t: got %d new probes, want one at once", newest, now-before)
			}
			pass(time.Minute)
			left.Stop()
			if n.String() != "[]" {
				t.Errorf("newest %t: told %s, want nothing", newest, n)
			}
		})
	}
}

// The probe of an older Watch that stays is finished and counts.
func TestJoinDuringAProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.takes = time.Second
		p.setDown(true)
		s := p.spec()
		s.Fails = 5
		a := c.Watch("a", s, nil)
		pass(time.Second / 2)
		b := c.Watch("a", p.spec(), nil) // one failure is enough now
		pass(time.Second / 2)
		if _, n := p.begins(); n != 1 || b.Healthy() {
			t.Errorf("got %d probes, healthy %t; want the one that was under way to count", n, b.Healthy())
		}
		a.Stop()
		b.Stop()
	})
}

// Stop waits for the notify that runs, whoever calls it, and for no other's.
func TestStopWaitsForNotify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.setDown(true)
		var returned atomic.Bool
		var late told
		slow := c.Watch("a", p.spec(), func(bool) {
			<-time.After(5 * time.Second)
			returned.Store(true)
		})
		next := c.Watch("a", p.spec(), late.notify)
		pass(time.Second)
		next.Stop() // before its turn has come
		var stopping sync.WaitGroup
		for range 2 {
			stopping.Go(func() {
				slow.Stop()
				if !returned.Load() {
					t.Error("Stop returned before notify")
				}
			})
		}
		synctest.Wait()
		if returned.Load() || late.String() != "[]" {
			t.Errorf("notify returned %t, the other was told %s; want neither yet", returned.Load(), &late)
		}
		if slow.Healthy() {
			t.Error("got healthy while unhealthy is told")
		}
		stopping.Wait()
		pass(time.Minute)
		if late.String() != "[]" {
			t.Errorf("told %s after Stop", &late)
		}
		leftovers(t, c)
	})
}

// Nothing of a config is kept once its Watch has stopped.
func TestStoppedWatchIsForgotten(t *testing.T) {
	type config struct{ _ [64]byte }
	c := NewCheckers()
	watch := func() (*Watch, weak.Pointer[config]) {
		old := new(config)
		s := Spec{
			Interval: time.Hour, Timeout: time.Second, Fails: 1, Passes: 1, Logger: zap.NewNop(),
			Probe: func(context.Context) error { runtime.KeepAlive(old); return nil },
		}
		return c.Watch("a", s, func(bool) { runtime.KeepAlive(old) }), weak.Make(old)
	}
	oldest, first := watch()
	middle, _ := watch()
	newest, last := watch()
	defer middle.Stop()
	oldest.Stop()
	newest.Stop()
	for i := 0; first.Value() != nil || last.Value() != nil; i++ {
		if i == 1000 {
			t.Fatal("the config of a stopped Watch is still reachable")
		}
		runtime.GC()
		runtime.Gosched()
	}
}

// Many users come, go, ask and hurry at once: every Watch hears changes that
// alternate, none after its Stop, and nothing is left.
func TestCrowd(t *testing.T) {
	c := NewCheckers()
	var flip atomic.Int64
	probe := func(context.Context) error {
		if flip.Add(1)%3 == 0 {
			return errDown
		}
		return nil
	}
	keys := []string{"a", "b", "c"}
	var users sync.WaitGroup
	var changes atomic.Int64
	for range 20 {
		users.Go(func() {
			for range 200 {
				var stopped atomic.Bool
				var last atomic.Int32 // 0: nothing yet
				notify := func(healthy bool) {
					changes.Add(1)
					if stopped.Load() {
						t.Error("notify began after Stop")
					}
					now := int32(1)
					if healthy {
						now = 2
					}
					if last.Swap(now) == now {
						t.Errorf("told %t twice", healthy)
					}
				}
				s := Spec{
					Interval: time.Duration(20+rand.IntN(200)) * time.Microsecond, Timeout: time.Second, Fails: 1, Passes: 1,
					Probe: probe, Logger: zap.NewNop(),
				}
				w := c.Watch(keys[rand.IntN(len(keys))], s, notify)
				for range rand.IntN(20) {
					w.Hurry()
					_ = w.Healthy()
					runtime.Gosched()
				}
				w.Stop()
				stopped.Store(true)
			}
		})
	}
	users.Wait()
	leftovers(t, c)
	if changes.Load() == 0 {
		t.Error("got no change at all")
	}
}
