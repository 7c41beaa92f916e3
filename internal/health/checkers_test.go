// This file tests when upstreams are probed, and what the results do to one user
// of them.

package health

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestProbesComeAtOnceAndThenInEveryInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.takes = 2 * time.Second // which does not add to the interval
		w := c.Watch("a", p.spec(), nil)
		pass(0)
		if got, _ := p.begins(); !slices.Equal(got, []time.Duration{0}) {
			t.Fatalf("got probes at %v, want one at once", got)
		}
		pass(1000 * 10 * time.Second)
		w.Stop()
		begins, n := p.begins()
		shortest, longest := time.Hour, time.Duration(0)
		for i := 1; i < n; i++ {
			gap := begins[i] - begins[i-1]
			shortest, longest = min(shortest, gap), max(longest, gap)
		}
		if shortest < 9*time.Second || longest > 10*time.Second {
			t.Errorf("got pauses of %s to %s, want 9s to 10s", shortest, longest)
		}
		if shortest > 9100*time.Millisecond || longest < 9900*time.Millisecond {
			t.Errorf("got pauses of %s to %s, want them spread over 9s to 10s", shortest, longest)
		}
		synctest.Wait()
		leftovers(t, c)
	})
}

// + is a probe that passes, - one that fails; below each, the state after it.
func TestThresholds(t *testing.T) {
	for _, test := range []struct {
		fails, passes  int
		results, state string
	}{
		{1, 1, "+-+--++", "+-+--++"},
		{3, 1, "--+---+-", "+++++-++"},
		{1, 3, "-++-+++-", "-----" + "-+-"},
		{2, 2, "-+-+--+-++-", "+++++----++"},
		{1, 1, "-", "-"},
	} {
		t.Run(fmt.Sprintf("%d %d %s", test.fails, test.passes, test.results), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, p, n := NewCheckers(), newProber(), new(told)
				s, i := p.spec(), 0
				s.Fails, s.Passes = test.fails, test.passes
				s.Probe = func(context.Context) error {
					i++
					if test.results[i-1] == '-' {
						return errDown
					}
					return nil
				}
				w := c.Watch("a", s, n.notify)
				defer w.Stop()
				state, last, changes := "", true, []bool{}
				for i := range test.results {
					if i > 0 {
						w.Hurry()
						pass(hurryPause)
					}
					synctest.Wait()
					if w.Healthy() != last {
						last = !last
						changes = append(changes, last)
					}
					state += map[bool]string{true: "+", false: "-"}[last]
				}
				if state != test.state {
					t.Errorf("got %s, want %s", state, test.state)
				}
				if got, want := n.String(), fmt.Sprint(changes); got != want {
					t.Errorf("told %s, want %s", got, want)
				}
			})
		})
	}
}

func TestLogs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.DebugLevel)
		c, p := NewCheckers(), newProber()
		s := p.spec()
		s.Logger, s.Fails = zap.New(core), 2
		w := c.Watch("a", s, nil)
		defer w.Stop()
		for _, down := range []bool{true, true, true, false} {
			p.setDown(down)
			pass(10 * time.Second)
		}
		var got []string
		for _, e := range logs.All() {
			fields := e.ContextMap()
			got = append(got, fmt.Sprintf("%s: %s: %v %v", e.Level, e.Message, fields["upstream"], fields["error"]))
		}
		failed, unhealthy := "debug: health check failed: app:8080 connection refused", "info: upstream is unhealthy: app:8080 connection refused"
		for _, line := range []struct {
			text  string
			times int
		}{{unhealthy, 1}, {"info: upstream is healthy: app:8080 <nil>", 1}} {
			if n := len(slices.DeleteFunc(slices.Clone(got), func(s string) bool { return s != line.text })); n != line.times {
				t.Errorf("got %q %d times, want %d:\n%s", line.text, n, line.times, strings.Join(got, "\n"))
			}
		}
		if got[0] != failed || got[1] != failed || got[2] != unhealthy || got[len(got)-1] != "info: upstream is healthy: app:8080 <nil>" {
			t.Errorf("got\n%s", strings.Join(got, "\n"))
		}
	})
}

// A probe that hangs fails after its timeout, and nobody else waits for it.
func TestHangingProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, hanging, other := NewCheckers(), newProber(), newProber()
		hanging.takes = time.Hour
		a, b := c.Watch("a", hanging.spec(), nil), c.Watch("b", other.spec(), nil)
		defer b.Stop()
		pass(3*time.Second - 1)
		if !a.Healthy() {
			t.Error("got unhealthy before the timeout")
		}
		pass(1)
		if a.Healthy() || !b.Healthy() {
			t.Errorf("after the timeout: got healthy %t and %t, want only the other", a.Healthy(), b.Healthy())
		}
		pass(7 * time.Second)
		begins, n := hanging.begins()
		if n != 2 || begins[1] < 9*time.Second {
			t.Errorf("got probes at %v, want the second an interval after the first", begins)
		}
		if begins, n := other.begins(); n != 2 || begins[0] != 0 {
			t.Errorf("got probes of the other at %v, want 2", begins)
		}
		a.Stop()
		synctest.Wait()
		if hanging.canceled != 1 {
			t.Errorf("got %d probes canceled, want the one under way", hanging.canceled)
		}
	})
}

func TestProbesOfAKeyNeverOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.takes = time.Hour
		s := p.spec()
		s.Interval = time.Second // shorter than the timeout
		w := c.Watch("a", s, nil)
		for range 20 {
			w.Hurry()
			pass(time.Second)
		}
		w.Stop()
		if _, n := p.begins(); p.most != 1 || n != 7 {
			t.Errorf("got %d probes, %d at once; want one after the other, 7", n, p.most)
		}
	})
}

func TestShortestInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.takes = time.Millisecond
		s := p.spec()
		s.Interval = 1 // too short to be shortened
		w := c.Watch("a", s, nil)
		pass(10*time.Millisecond - 1)
		w.Stop()
		if _, n := p.begins(); n != 10 {
			t.Errorf("got %d probes, want 10", n)
		}
	})
}

func TestHurry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		w := c.Watch("a", p.spec(), nil)
		defer w.Stop()
		pass(3 * time.Second)
		for range 100 {
			w.Hurry() // at once, and once
		}
		pass(0)
		for range 7 {
			pass(100 * time.Millisecond)
			w.Hurry() // not within a second
		}
		pass(2 * time.Second)
		want := []time.Duration{0, 3 * time.Second, 4 * time.Second}
		if got, _ := p.begins(); !slices.Equal(got, want) {
			t.Errorf("got probes at %v, want %v", got, want)
		}
		// The interval counts from the last one.
		pass(7 * time.Second)
		if _, n := p.begins(); n != 3 {
			t.Errorf("got %d probes, want no more before the interval is over", n)
		}
		pass(2 * time.Second)
		if _, n := p.begins(); n != 4 {
			t.Errorf("got %d probes, want one more after the interval", n)
		}
	})
}

// What a probe under way has seen may be older than the Hurry.
func TestHurryDuringAProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		p.takes = 2 * time.Second
		w := c.Watch("a", p.spec(), nil)
		defer w.Stop()
		pass(1900 * time.Millisecond)
		w.Hurry()
		pass(3 * time.Second)
		if got, _ := p.begins(); !slices.Equal(got, []time.Duration{0, 2 * time.Second}) {
			t.Errorf("got probes at %v, want the second after the first", got)
		}
	})
}

func TestNotifyMayAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p := NewCheckers(), newProber()
		var w *Watch
		var mu sync.Mutex
		n := 0
		mu.Lock()
		w = c.Watch("a", p.spec(), func(healthy bool) {
			mu.Lock()
			defer mu.Unlock()
			n++
			w.Hurry()
			other := c.Watch("b", p.spec(), nil)
			defer other.Stop()
			if w.Healthy() != healthy {
				t.Errorf("told %t, then asked: got %t", healthy, w.Healthy())
			}
		})
		mu.Unlock()
		for i := range 10 {
			p.setDown(i%2 == 0)
			pass(10 * time.Second)
		}
		w.Stop()
		mu.Lock()
		defer mu.Unlock()
		if n != 10 {
			t.Errorf("got %d calls, want 10", n)
		}
	})
}

// The last Stop breaks off the probe under way, which tells nobody anything; a
// Watch after that begins anew.
func TestLastStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, p, n := NewCheckers(), newProber(), new(told)
		p.setDown(true)
		w := c.Watch("a", p.spec(), n.notify)
		pass(0)
		p.takes = time.Hour
		w.Hurry()
		pass(2 * time.Second)
		start := time.Now()
		for range 3 {
			w.Stop()
		}
		synctest.Wait()
		if took := time.Since(start); took != 0 || p.canceled != 1 || p.running != 0 {
			t.Errorf("took %s, %d canceled, %d running; want none left at once", took, p.canceled, p.running)
		}
		leftovers(t, c)
		if got := n.String(); got != "[false]" {
			t.Errorf("told %s, want one change", got)
		}
		p.takes = 0
		p.setDown(false)
		again := c.Watch("a", p.spec(), n.notify)
		defer again.Stop()
		if !again.Healthy() {
			t.Error("got unhealthy of a new key")
		}
		w.Stop() // of no effect on the new one
		pass(0)
		if _, probes := p.begins(); probes != 3 || n.String() != "[false]" {
			t.Errorf("got %d probes, told %s; want a new one, and nothing", probes, n)
		}
	})
}
