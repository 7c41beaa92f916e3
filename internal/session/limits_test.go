// This file tests what a route's limits end: lifetime, idleness, no first
// message, and a peer that takes nothing.

package session

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// keepBusy lets both peers send something every period until the end.
func (r *rig) keepBusy(period time.Duration, frame func(p *peer) []byte) {
	for r.live() {
		r.client.send(frame(r.client))
		r.backend.send(frame(r.backend))
		r.pass(period)
	}
}

func message(p *peer) []byte { return p.text("data") }
func ping(p *peer) []byte    { return p.frame(true, 0, ws.OpPing, []byte("no data")) }

func TestLifetimeEndsBetween90And100Percent(t *testing.T) {
	for name, traffic := range map[string]func(r *rig){
		"silence":         func(r *rig) {},
		"steady traffic":  func(r *rig) { r.keepBusy(300*time.Millisecond, message) },
		"now and then":    func(r *rig) { r.keepBusy(2700*time.Millisecond, message) },
		"control frames":  func(r *rig) { r.keepBusy(7*time.Second, ping) },
		"a jammed client": func(r *rig) { r.client.stall(); r.backend.send(r.backend.binary(200_000)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const lifetime = 10 * time.Minute
				r := start(t, setup{settings: Settings{MaxLifetime: lifetime}})
				traffic(r)
				r.wait(time.Hour)
				// The clock may look up to activePeriod late when data moves.
				if got := r.endedAt.Sub(r.began); got < lifetime*9/10 || got > lifetime+activePeriod {
					t.Errorf("got the end after %v, want 9 to 10 minutes", got)
				}
				if got := r.rec.Ending().Reason; got != registry.Lifetime {
					t.Errorf("got reason %q, want the lifetime", got)
				}
			})
		})
	}
}

func TestIdleCountsDataAlone(t *testing.T) {
	const idle = time.Minute
	for _, test := range []struct {
		name  string
		frame func(p *peer) []byte
		from  func(r *rig) *peer
		lives bool
	}{
		{"messages of the client", message, func(r *rig) *peer { return r.client }, true},
		{"messages of the backend", message, func(r *rig) *peer { return r.backend }, true},
		{"empty messages", func(p *peer) []byte { return p.text("") }, func(r *rig) *peer { return r.client }, true},
		{"pings of the client", ping, func(r *rig) *peer { return r.client }, false},
		{"pings of the backend", ping, func(r *rig) *peer { return r.backend }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := defaults // our own pings are no data either
				s.IdleTimeout = idle
				r := start(t, setup{settings: s})
				from := test.from(r)
				for range 60 {
					if !r.live() {
						break
					}
					from.send(test.frame(from))
					r.pass(50 * time.Second)
				}
				if !test.lives {
					r.wantEnd(time.Minute, registry.Idle, "1001 idle", "1001")
					if got := r.endedAt.Sub(r.began); got < idle-1 || got > idle+activePeriod {
						t.Errorf("got the end after %v, want %v", got, idle)
					}
					return
				}
				if !r.live() {
					t.Fatalf("got the end (%s) after %v, want it alive while there is data", r.rec.Ending().Reason, r.lasting)
				}
				r.wantEnd(time.Hour, registry.Idle, "1001 idle", "1001")
				last := r.began.Add(59 * 50 * time.Second)
				if got := r.endedAt.Sub(last); got < idle-1 || got > idle+activePeriod {
					t.Errorf("got the end %v after the last message, want %v", got, idle)
				}
			})
		})
	}
}

func TestFirstDataTimeoutEndsOnlyWhoNeverSentData(t *testing.T) {
	for _, test := range []struct {
		name  string
		send  func(r *rig)
		lives bool
	}{
		{"nothing", func(r *rig) {}, false},
		{"control frames", func(r *rig) { r.client.send(ping(r.client)); r.backend.send(ping(r.backend)) }, false},
		{"half a small frame", func(r *rig) { r.client.send(r.client.binary(100)[:50]) }, false},
		{"a message of the client", func(r *rig) { r.client.send(message(r.client)) }, true},
		{"a message of the backend", func(r *rig) { r.backend.send(message(r.backend)) }, true},
		{"an empty message", func(r *rig) { r.client.send(r.client.text("")) }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := defaults
				s.FirstDataTimeout = time.Minute
				r := start(t, setup{settings: s})
				r.pass(40 * time.Second)
				test.send(r)
				r.pass(time.Hour)
				if test.lives != r.live() {
					t.Fatalf("got alive: %v (reason %q), want %v", r.live(), r.rec.Ending().Reason, test.lives)
				}
				if !test.lives {
					r.wantEnd(0, registry.NoData, "1001 no data", "1001")
					if got := r.endedAt.Sub(r.began); got < time.Minute || got > time.Minute+activePeriod {
						t.Errorf("got the end after %v, want a minute", got)
					}
				}
			})
		})
	}
}

func TestLimitsThatAreOffNeverEndASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{})
		r.pass(365 * day)
		r.client.send(r.client.text("still there"))
		synctest.Wait()
		if got, _ := r.backend.messages(); len(got) != 1 || !r.live() {
			t.Errorf("got %q (reason %q) after a year, want the message", got, r.rec.Ending().Reason)
		}
	})
}

func TestChangedLimitsCountAtOnce(t *testing.T) {
	for _, test := range []struct {
		name   string
		s      Settings
		reason registry.Reason
	}{
		{"lifetime that is over", Settings{MaxLifetime: 50 * time.Minute}, registry.Lifetime},
		{"idle timeout that is over", Settings{IdleTimeout: 50 * time.Minute}, registry.Idle},
		{"first data timeout that is over", Settings{FirstDataTimeout: 50 * time.Minute}, registry.NoData},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{})
				r.pass(time.Hour)
				r.change(test.s)
				if r.live() {
					t.Fatal("got the session open, want it ended at once")
				}
				r.wait(time.Minute)
				if got := r.endedAt.Sub(r.began); got != time.Hour || r.rec.Ending().Reason != test.reason {
					t.Errorf("got %s after %v, want %s after an hour", r.rec.Ending().Reason, got, test.reason)
				}
			})
		})
	}
	t.Run("lifetime that is not over", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := start(t, setup{settings: Settings{MaxLifetime: time.Hour}})
			r.pass(30 * time.Minute)
			r.change(Settings{MaxLifetime: 40 * time.Minute})
			r.wantEnd(time.Hour, registry.Lifetime, "1001 end of lifetime", "1001")
			if got := r.lasting; got < 36*time.Minute || got > 40*time.Minute {
				t.Errorf("got the end after %v, want 36 to 40 minutes", got)
			}
		})
	})
	t.Run("lifetime that is lifted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := start(t, setup{settings: Settings{MaxLifetime: time.Hour}})
			r.pass(30 * time.Minute)
			r.change(Settings{})
			r.pass(day)
			if !r.live() {
				t.Errorf("got the end (%s), want it alive", r.rec.Ending().Reason)
			}
		})
	})
}

func TestAPlannedEndCanBeMovedAndLifted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		orphan := registry.Ending{Reason: registry.Orphan}
		r := start(t, setup{})
		r.rec.CloseAt(time.Now().Add(10*time.Second), orphan)
		r.pass(9 * time.Second)
		r.rec.CloseAt(time.Time{}, registry.Ending{})
		r.pass(day)
		if !r.live() {
			t.Fatalf("got the end (%s), want the plan lifted", r.rec.Ending().Reason)
		}
		planned := time.Now()
		r.rec.CloseAt(planned.Add(time.Hour), orphan)
		r.rec.CloseAt(planned.Add(3*time.Second), orphan)
		r.wantEnd(time.Minute, registry.Orphan, "1001 route removed", "1001")
		if got := r.endedAt.Sub(planned); got != 3*time.Second {
			t.Errorf("got the end after %v, want 3s", got)
		}
	})
}
