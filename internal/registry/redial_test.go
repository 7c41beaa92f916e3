// This file tests how many connections dial one upstream at once after they lost
// their backend.

package registry

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// dialer is a connection that wants to dial an upstream again.
type dialer struct {
	cancel context.CancelFunc
	done   chan struct{} // closed by dial
	err    error         // of Redial, valid after done
	at     time.Time     // when Redial returned, valid after done
}

// redial calls Redial in a goroutine, which ends with it.
func redial(t *testing.T, route *Route, u *Upstream, limit int) *dialer {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	d := &dialer{cancel: cancel, done: make(chan struct{})}
	go d.dial(ctx, route, u, limit)
	return d
}

func (d *dialer) dial(ctx context.Context, route *Route, u *Upstream, limit int) {
	defer close(d.done)
	d.err = route.Redial(ctx, u, limit)
	d.at = time.Now()
}

// allowed reports whether it is its turn. All goroutines of the bubble wait.
func (d *dialer) allowed() bool {
	synctest.Wait()
	select {
	case <-d.done:
		return d.err == nil
	default:
		return false
	}
}

// queue is an upstream with a place taken.
func queue(t *testing.T) (*Route, *Upstream) {
	t.Helper()
	route := New().Retain(WebSocket, "a")
	return route, choose(route, "app:80")
}

// idle checks that nobody dials and nobody waits.
func idle(t *testing.T, u *Upstream) {
	t.Helper()
	if u.redials.now != 0 || u.redials.waiting.Len() != 0 {
		t.Errorf("got %d dials under way and %d waiting after all have ended, want none", u.redials.now, u.redials.waiting.Len())
	}
}

func TestRedialIsFirstComeFirstServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		route, u := queue(t)
		var all []*dialer
		for range 10 {
			all = append(all, redial(t, route, u, 3))
			synctest.Wait() // it stands in the queue
		}
		for done := range all {
			for i, d := range all {
				if got, want := d.allowed(), i < done+3; got != want {
					t.Errorf("after %d dials: number %d: got allowed %t, want %t", done, i, got, want)
				}
			}
			route.Redialed(u)
		}
		idle(t, u)
	})
}

func TestRedialsOfTwoUpstreamsDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		route, u := queue(t)
		other := choose(route, "app:81")
		if !redial(t, route, u, 1).allowed() || !redial(t, route, other, 1).allowed() {
			t.Error("got the first dial of an upstream made wait, want none")
		}
		again := redial(t, route, u, 1)
		if again.allowed() {
			t.Error("got a second dial at once, want it made wait")
		}
		route.Redialed(other)
		if again.allowed() {
			t.Error("got a dial allowed by the end of another upstream's")
		}
		route.Redialed(u)
		if !again.allowed() {
			t.Error("got a dial made wait with nobody before it")
		}
		route.Redialed(u)
		idle(t, u)
		idle(t, other)
	})
}

func TestRedialGivesUpWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		route, u := queue(t)
		first := redial(t, route, u, 1)
		if !first.allowed() {
			t.Fatal("got the first one made wait")
		}
		second := redial(t, route, u, 1)
		synctest.Wait()
		third := redial(t, route, u, 1)
		synctest.Wait()
		fourth := redial(t, route, u, 1)
		synctest.Wait()
		third.cancel()
		synctest.Wait()
		if <-third.done; !errors.Is(third.err, context.Canceled) {
			t.Errorf("got error %v, want that its context has ended", third.err)
		}
		if second.allowed() || fourth.allowed() {
			t.Error("got a dial allowed because another gave up waiting")
		}
		route.Redialed(u)
		if !second.allowed() || fourth.allowed() {
			t.Error("got the second one passed over")
		}
		route.Redialed(u)
		if !fourth.allowed() {
			t.Error("got the turn given to one that has gone")
		}
		route.Redialed(u)
		idle(t, u)
	})
}

// A turn that comes together with the end of the context is handed on.
func TestRedialTurnThatComesTooLate(t *testing.T) {
	for run := range 1000 {
		route, u := queue(t)
		if err := route.Redial(t.Context(), u, 1); err != nil {
			t.Fatal(err)
		}
		second := redial(t, route, u, 1)
		third := redial(t, route, u, 1)
		for waiting := 0; waiting < 2; {
			route.reg.mu.Lock()
			waiting = u.redials.waiting.Len()
			route.reg.mu.Unlock()
		}
		var both sync.WaitGroup
		both.Go(second.cancel)
		both.Go(func() { route.Redialed(u) })
		both.Wait()
		<-second.done
		if second.err == nil {
			route.Redialed(u)
		}
		select {
		case <-third.done:
		case <-time.After(5 * time.Second):
			t.Fatalf("run %d: got the third one waiting for ever after the second gave up (%v)", run, second.err)
		}
		if third.err != nil {
			t.Fatal(third.err)
		}
		route.Redialed(u)
		idle(t, u)
		second.cancel()
		third.cancel()
	}
}

// Dialers come, dial, and give up as they like: never more than the limit dial at
// once, none waits while there is room, and all are served in their order.
func TestRedialRandomly(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 4))
			route, u := queue(t)
			limit := 1 + rng.IntN(5)
			var waiting, dialing []*dialer
			for range 300 {
				switch n := rng.IntN(5); {
				case n < 2:
					waiting = append(waiting, redial(t, route, u, limit))
				case n == 2 && len(waiting) > 0:
					i := rng.IntN(len(waiting))
					waiting[i].cancel()
					synctest.Wait()
					if <-waiting[i].done; waiting[i].err == nil {
						t.Fatalf("seed %d: got a turn for one whose context has ended", seed)
					}
					waiting = slices.Delete(waiting, i, i+1)
				case n > 2 && len(dialing) > 0:
					dialing = slices.Delete(dialing, 0, 1)
					route.Redialed(u)
				}
				synctest.Wait()
				for len(waiting) > 0 && waiting[0].allowed() {
					dialing, waiting = append(dialing, waiting[0]), waiting[1:]
				}
				for _, d := range waiting {
					if d.allowed() {
						t.Fatalf("seed %d: got one allowed before another that came first", seed)
					}
				}
				if len(dialing) > limit || len(dialing) < limit && len(waiting) > 0 {
					t.Fatalf("seed %d: got %d dials at once with %d waiting, limit %d", seed, len(dialing), len(waiting), limit)
				}
			}
			for _, d := range waiting {
				d.cancel()
			}
			synctest.Wait()
			for range dialing {
				route.Redialed(u)
			}
			idle(t, u)
		})
	}
}

// The same without a model, at full speed: the limit holds, and nobody is forgotten.
func TestRedialConcurrently(t *testing.T) {
	const limit = 4
	route, u := queue(t)
	var mu sync.Mutex
	var now, most, served, gaveUp int
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			for range 200 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rng.IntN(300))*time.Microsecond)
				err := route.Redial(ctx, u, limit)
				mu.Lock()
				if err != nil {
					gaveUp++
					mu.Unlock()
					cancel()
					continue
				}
				now, served = now+1, served+1
				most = max(most, now)
				mu.Unlock()
				<-ctx.Done()
				cancel()
				mu.Lock()
				now--
				mu.Unlock()
				route.Redialed(u)
			}
		})
	}
	all.Wait()
	if most > limit || served == 0 || gaveUp == 0 {
		t.Errorf("got %d dials at once, %d served, %d that gave up; want at most %d at once, and some of either", most, served, gaveUp, limit)
	}
	idle(t, u)
}

// Limits change by a reload, which counts at once: also while many wait.
func TestRedialUnderAnotherLimit(t *testing.T) {
	t.Run("lower", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			route, u := queue(t)
			for range 8 {
				if !redial(t, route, u, 8).allowed() {
					t.Fatal("got a dial made wait below the limit")
				}
			}
			var late []*dialer
			for range 12 { // after a reload
				late = append(late, redial(t, route, u, 2))
				synctest.Wait()
			}
			for n := range 6 {
				route.Redialed(u)
				if late[0].allowed() {
					t.Fatalf("got a dial allowed with %d others under way, want at most 2 at once", 7-n)
				}
			}
			route.Redialed(u)
			if !late[0].allowed() || late[1].allowed() {
				t.Error("want one allowed, and only one, once fewer than 2 dial")
			}
		})
	})
	t.Run("higher", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			route, u := queue(t)
			early := []*dialer{}
			for range 4 {
				early = append(early, redial(t, route, u, 1))
				synctest.Wait()
			}
			late := redial(t, route, u, 3) // after a reload
			for i, d := range early {
				if got, want := d.allowed(), i < 3; got != want {
					t.Errorf("number %d of those that waited: got allowed %t, want %t", i, got, want)
				}
			}
			if late.allowed() {
				t.Error("got one allowed before others that came first")
			}
			route.Redialed(u)
			route.Redialed(u)
			if !early[3].allowed() || !late.allowed() {
				t.Error("got some made wait with only one dial under way, want 3 at once")
			}
		})
	})
}
