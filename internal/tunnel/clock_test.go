// This file tests, in fake time, what a tunnel is ended for by the clock.

package tunnel

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

const day = 24 * time.Hour

// memRig is a tunnel in memory, of which the test has the far ends.
func memRig(t *testing.T, set Settings, room int) (r *rig, client, backend *memConn) {
	t.Helper()
	nearClient, client := newMemPipe(room)
	nearBackend, backend := newMemPipe(room)
	r = start(t, set, nearClient, nearBackend, "")
	synctest.Wait()
	return r, client, backend
}

// pass lets fake time pass, and everything that happens meanwhile.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (r *rig) wantLive() {
	r.t.Helper()
	if got := r.rec.State(); got != registry.Open && got != registry.HalfOpen {
		r.t.Fatalf("got state %v (reason %q) after %v, want it alive", got, r.rec.Ending().Reason, time.Since(r.began))
	}
}

func (r *rig) wantWarnings(want int32) {
	r.t.Helper()
	if got := r.warnings.Load(); got != want {
		r.t.Errorf("got %d warnings after %v, want %d", got, time.Since(r.began), want)
	}
}

// wantEndAfter checks when the tunnel's end was decided, counted from a moment.
func (r *rig) wantEndAfter(from time.Time, least, most time.Duration, reason registry.Reason) {
	r.t.Helper()
	r.wantEnd(time.Until(from)+most+time.Hour, reason)
	if got := r.decided.Sub(from); got < least || got > most {
		r.t.Errorf("got the end after %v, want %v to %v", got, least, most)
	}
}

func TestInactivity(t *testing.T) {
	base := Settings{InactivityTimeout: 4 * time.Hour, InactivityGrace: 10 * time.Minute, InactivityMultiplier: 10, MaxLifetime: 365 * day}
	for _, test := range []struct {
		treatment Treatment
		limit     time.Duration
	}{
		{Standard, 4 * time.Hour},
		{Extended, 40 * time.Hour},
	} {
		t.Run(test.treatment.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				set := base
				set.Treatment = test.treatment
				r, _, _ := memRig(t, set, 100)
				pass(test.limit - time.Minute)
				r.wantLive()
				r.wantWarnings(0)
				pass(time.Minute)
				r.wantLive()
				r.wantWarnings(1)
				if got := time.Duration(r.idle.Load()); got != test.limit {
					t.Errorf("got a warning after %v without a byte, want %v", got, test.limit)
				}
				pass(set.InactivityGrace - time.Second)
				r.wantLive()
				r.wantEndAfter(r.began, test.limit+10*time.Minute, test.limit+11*time.Minute, registry.Idle)
				r.wantWarnings(1)
			})
		})
	}
	t.Run("immortal", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			set := base
			set.Treatment, set.MaxLifetime = Immortal, time.Hour
			r, client, backend := memRig(t, set, 100)
			pass(365 * day)
			r.wantLive()
			r.wantWarnings(0)
			send(t, client, "still there")
			wantText(t, backend, "still there")
		})
	})
	t.Run("no limit", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, _, _ := memRig(t, Settings{}, 100)
			pass(365 * day)
			r.wantLive()
		})
	})
}

func TestTrafficResetsInactivity(t *testing.T) {
	set := Settings{InactivityTimeout: time.Minute, InactivityGrace: 10 * time.Minute}
	for _, test := range []struct {
		name string
		send func(r *rig, client, backend *memConn)
	}{
		{"from the client", func(_ *rig, client, _ *memConn) { _, _ = client.Write([]byte("x")) }},
		{"from the backend", func(_ *rig, _, backend *memConn) { _, _ = backend.Write([]byte("x")) }},
		// Unless there is no room, nothing but the count tells the clock of a splice.
		{"spliced", func(r *rig, _, _ *memConn) { r.rec.Count(registry.In, 1, 0) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, client, backend := memRig(t, set, 100)
				pass(59 * time.Second)
				test.send(r, client, backend)
				pass(59 * time.Second)
				r.wantWarnings(0)
				pass(time.Second)
				r.wantWarnings(1)
				// Within the grace: the warning is void, and there may be another one.
				pass(time.Minute)
				test.send(r, client, backend)
				again := time.Now()
				pass(59 * time.Second)
				r.wantWarnings(1)
				pass(time.Second)
				r.wantWarnings(2)
				r.wantEndAfter(again, 11*time.Minute, 12*time.Minute, registry.Idle)
			})
		})
	}
}

func TestInactivityProductDoesNotOverflow(t *testing.T) {
	for _, test := range []struct {
		set  Settings
		want time.Duration
	}{
		{Settings{Treatment: Extended, InactivityTimeout: math.MaxInt64, InactivityMultiplier: 6}, math.MaxInt64},
		{Settings{Treatment: Extended, InactivityTimeout: 100 * 365 * day, InactivityMultiplier: 1e9}, math.MaxInt64},
		{Settings{Treatment: Extended, InactivityTimeout: time.Hour, InactivityMultiplier: 1.5}, 90 * time.Minute},
		{Settings{Treatment: Standard, InactivityTimeout: time.Hour, InactivityMultiplier: 6}, time.Hour},
	} {
		if got := test.set.inactivity(); got != test.want {
			t.Errorf("%+v: got %v, want %v", test.set, got, test.want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		r, _, _ := memRig(t, Settings{InactivityTimeout: math.MaxInt64, MaxLifetime: math.MaxInt64, StuckTimeout: math.MaxInt64}, 100)
		pass(365 * day)
		r.wantLive()
	})
}

func TestLifetimeIsShortenedAtRandom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ends []time.Duration
		for range 20 {
			r, client, backend := memRig(t, Settings{MaxLifetime: 10 * time.Hour}, 100)
			for range 8 {
				pass(time.Hour)
				send(t, client, "x") // traffic does not extend it
				wantText(t, backend, "x")
			}
			r.wantEndAfter(r.began, 9*time.Hour, 10*time.Hour, registry.Lifetime)
			ends = append(ends, r.decided.Sub(r.began))
		}
		for i := range ends {
			if ends[i] != ends[0] {
				return
			}
		}
		t.Errorf("got %d ends after %v, want them spread", len(ends), ends[0])
	})
}

func TestHalfOpenTimeoutCountsFromTheEOF(t *testing.T) {
	set := Settings{HalfOpenTimeout: 5 * time.Minute}
	for _, test := range []struct {
		name        string
		first, last func(client, backend *memConn) *memConn
	}{
		{"client", func(c, _ *memConn) *memConn { return c }, func(_, b *memConn) *memConn { return b }},
		{"backend", func(_, b *memConn) *memConn { return b }, func(c, _ *memConn) *memConn { return c }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, client, backend := memRig(t, set, 100)
				first, last := test.first(client, backend), test.last(client, backend)
				pass(6 * time.Minute)
				_ = first.CloseWrite()
				ended := time.Now()
				synctest.Wait()
				wantEOF(t, last)
				if got := r.rec.State(); got != registry.HalfOpen {
					t.Errorf("got state %v after an EOF, want half_open", got)
				}
				for range 4 {
					pass(time.Minute)
					send(t, last, "data") // traffic does not extend it
					wantText(t, first, "data")
				}
				r.wantEndAfter(ended, 5*time.Minute, 5*time.Minute, registry.HalfOpenTimeout)
				wantEOF(t, first)
			})
		})
	}
	t.Run("shorter than the clock's period", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, _ := memRig(t, Settings{HalfOpenTimeout: activePeriod / 5}, 100)
			pass(time.Minute)
			_ = client.CloseWrite()
			r.wantEndAfter(time.Now(), activePeriod/5, activePeriod/5, registry.HalfOpenTimeout)
			wantEOF(t, client)
		})
	})
	t.Run("both ended", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, backend := memRig(t, set, 100)
			_ = client.CloseWrite()
			pass(time.Minute)
			send(t, backend, "late")
			_ = backend.CloseWrite()
			r.wantEndAfter(r.began, time.Minute, time.Minute, registry.EOF)
			wantText(t, client, "late")
			wantEOF(t, client)
			wantEOF(t, backend)
		})
	})
}

func TestStuck(t *testing.T) {
	t.Run("a publisher is not, unless it is configured", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, backend := memRig(t, Settings{}, 100)
			for range 100 {
				send(t, client, "news")
				wantText(t, backend, "news")
				pass(time.Hour)
			}
			r.wantLive()
		})
	})
	set := Settings{StuckTimeout: time.Minute}
	t.Run("from the first byte that is unanswered", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, backend := memRig(t, set, 100)
			pass(time.Hour + time.Second)
			send(t, client, "question")
			pass(50 * time.Second)
			send(t, backend, "answer")
			pass(time.Hour)
			r.wantLive()
			wantText(t, backend, "question")
			wantText(t, client, "answer")
			send(t, client, "question")
			asked := time.Now()
			pass(30 * time.Second)
			send(t, client, "again")
			synctest.Wait()
			wantText(t, backend, "questionagain")
			r.wantEndAfter(asked, time.Minute, time.Minute, registry.Stuck)
		})
	})
	t.Run("not after the backend's end, which has a limit of its own", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, backend := memRig(t, set, 100)
			_ = backend.CloseWrite()
			synctest.Wait()
			send(t, client, "question")
			pass(time.Hour)
			r.wantLive()
		})
	})
}

func TestLivePeerThatDoesNotReadIsNotCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, client, backend := memRig(t, Settings{HalfOpenTimeout: time.Minute}, 100)
		go func() { _, _ = client.Write(make([]byte, 1000)) }()
		pass(day)
		r.wantLive()
		wantText(t, backend, string(make([]byte, 1000)))
	})
}

// Nobody reads the client here: the backend takes nothing more.
func TestPeerThatLeavesWhileTheOtherIsFullIsNoticed(t *testing.T) {
	fill := func(t *testing.T, set Settings) (r *rig, client, backend *memConn) {
		r, client, backend = memRig(t, set, 100)
		for range 7 { // 100 here, up to 512 in the pump, 100 there
			go func() { _, _ = client.Write(make([]byte, 100)) }()
			pass(time.Hour)
		}
		return r, client, backend
	}
	t.Run("FIN", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, backend := fill(t, Settings{HalfOpenTimeout: time.Minute})
			_ = client.CloseWrite()
			ended := time.Now()
			pass(activePeriod)
			if got := r.rec.State(); got != registry.HalfOpen {
				t.Fatalf("got state %v, want half_open", got)
			}
			r.wantEndAfter(ended, time.Minute, time.Minute+6*time.Second, registry.HalfOpenTimeout)
			if _, err := backend.Read(make([]byte, 1)); err == nil {
				t.Error("got more bytes, want the reset that says that some are missing")
			}
		})
	})
	t.Run("RST", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, _ := fill(t, Settings{})
			client.Reset()
			broke := time.Now()
			r.wantEndAfter(broke, 0, 2*activePeriod, registry.Reset)
		})
	})
	t.Run("RST in the half-open state", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, client, _ := memRig(t, Settings{}, 100)
			_ = client.CloseWrite()
			pass(time.Hour)
			r.wantLive()
			client.Reset()
			r.wantEndAfter(time.Now(), 0, 2*activePeriod, registry.Reset)
		})
	})
}

func TestChangedSettingsCountAtOnce(t *testing.T) {
	old := Settings{InactivityTimeout: 10 * time.Hour, InactivityGrace: time.Minute, MaxLifetime: 100 * time.Hour}
	for _, test := range []struct {
		name string
		set  Settings
		want registry.Reason // "": none
	}{
		{"lifetime that is over", Settings{MaxLifetime: time.Hour}, registry.Lifetime},
		{"lifetime that is lifted", Settings{}, ""},
		{"treatment that knows none", Settings{MaxLifetime: time.Hour, Treatment: Immortal}, ""},
		{"inactivity that is over", Settings{InactivityTimeout: time.Hour}, registry.Idle},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, _, _ := memRig(t, old, 100)
				pass(2 * time.Hour)
				r.change(test.set)
				synctest.Wait()
				if test.want == "" {
					pass(365 * day)
					r.wantLive()
					return
				}
				r.wantEndAfter(r.began, 2*time.Hour, 2*time.Hour, test.want)
			})
		})
	}
	t.Run("inactivity that is over is warned of before the grace", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r, _, _ := memRig(t, old, 100)
			pass(2 * time.Hour)
			r.change(Settings{InactivityTimeout: time.Hour, InactivityGrace: time.Hour})
			synctest.Wait()
			r.wantWarnings(1)
			r.wantEndAfter(r.began, 3*time.Hour, 3*time.Hour+6*time.Minute, registry.Idle)
		})
	})
}

func TestPlannedEndCanBeMovedAndLifted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		orphan := registry.Ending{Reason: registry.Orphan}
		r, _, _ := memRig(t, Settings{}, 100)
		r.rec.CloseAt(time.Now().Add(10*time.Second), orphan)
		pass(9 * time.Second)
		r.rec.CloseAt(time.Time{}, registry.Ending{})
		pass(day)
		r.wantLive()
		planned := time.Now()
		r.rec.CloseAt(planned.Add(time.Hour), orphan)
		r.rec.CloseAt(planned.Add(3*time.Second), orphan)
		r.wantEndAfter(planned, 3*time.Second, 3*time.Second, registry.Orphan)
	})
}
