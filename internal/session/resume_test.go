// This file tests what counts as the loss of a backend, what follows, and how
// another one is looked for.

package session

import (
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

func TestALostBackendIsReplacedAndTheClientNotTold(t *testing.T) {
	for _, loss := range []struct {
		name  string
		with  func(w *setup)
		cause func(r *rig)
		code  uint16
		after time.Duration // until it is noticed, at most
	}{
		{name: "exit", cause: func(r *rig) { r.backend.exit() }, code: 1006},
		{name: "FIN", cause: func(r *rig) { r.backend.sendFIN() }, code: 1006},
		{name: "reset", cause: func(r *rig) { r.backend.crash() }, code: 1006},
		{name: "nothing answers", cause: func(r *rig) {
			r.backend.behave(func(is *manners) { is.mute, is.silent = true, true })
		}, code: 1006, after: 61 * time.Second},
		{name: "nothing is taken", cause: func(r *rig) {
			r.backend.stall()
			r.client.send(r.client.binary(200_000))
		}, code: 1006, after: 32 * time.Second},
		{name: "refuses what is written", cause: func(r *rig) {
			r.backend.conn.CloseRead()
			r.client.send(r.client.text("refused"))
		}, code: 1006, after: 2 * time.Second},
		{name: "1001", cause: func(r *rig) { r.backend.sendClose(1001, "") }, code: 1001},
		{name: "1012", cause: func(r *rig) { r.backend.sendClose(1012, "restarting") }, code: 1012},
		{name: "1013 and FIN", cause: func(r *rig) { r.backend.sendClose(1013, ""); r.backend.sendFIN() }, code: 1013},
		{name: "vanishes while the client does not read", with: func(w *setup) { w.settings.WriteTimeout = 0 }, cause: func(r *rig) {
			r.client.stall()
			r.backend.send(r.backend.binary(60_000), r.backend.binary(60_000))
			synctest.Wait()
			r.backend.exit()
			time.AfterFunc(5*time.Second, r.client.resume)
		}, code: 1006, after: 5 * time.Second},
	} {
		t.Run(loss.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				with := setup{settings: resuming(replay.Unacked), others: []string{"b:80"}, answers: true}
				if loss.with != nil {
					loss.with(&with)
				}
				r := start(t, with)
				r.pass(10*time.Minute + 7*time.Second)
				began := time.Now()
				loss.cause(r)
				b := r.resumed()
				asked := r.asked()
				if len(asked) != 1 {
					t.Fatalf("got %d searches, want one", len(asked))
				}
				if got := asked[0].at.Sub(began); got > loss.after {
					t.Errorf("got the loss noticed after %v, want %v", got, loss.after)
				}
				got := asked[0].Interruption
				if want := (Interruption{Upstream: firstUpstream, Cause: loss.code, Replayed: got.Replayed}); got != want {
					t.Errorf("got %+v, want %+v", got, want)
				}
				r.client.send(r.client.text("to the next"))
				b.send(b.text("from the next"))
				r.pass(time.Minute)
				if got, _ := b.messages(); len(got) == 0 || got[len(got)-1] != "to the next" {
					t.Errorf("got %.40q at the next backend, want what was sent last", got)
				}
				if got, _ := r.client.messages(); len(got) == 0 || got[len(got)-1] != "from the next" {
					t.Errorf("got %d messages at the client, want what was sent last", len(got))
				}
				if got := r.client.farewell(t); got != "-" || !r.live() {
					t.Errorf("got the client told %q, state %v, want nothing", got, r.rec.State())
				}
				r.wantLost(firstUpstream)
				v := r.rec.View()
				if v.Upstream != "b:80" || v.Dial != "dial of b:80" || v.Resumes != 1 || r.places(firstUpstream) != 0 || r.places("b:80") != 1 {
					t.Errorf("got the record %+v, want it at b:80", v)
				}
			})
		})
	}
}

func TestOtherCloseFramesOfTheBackendEndTheSession(t *testing.T) {
	for _, code := range []uint16{1000, 1002, 1003, 1005, 1007, 1008, 1009, 1010, 1011, 1014, 3000, 4001} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(replay.Unacked)})
				r.backend.sendClose(code, "")
				want := fmt.Sprint(code)
				if code == 1005 {
					want = "empty"
				}
				r.wantEnd(time.Minute, registry.BackendClosed, want, want)
				if got := r.asked(); len(got) > 0 {
					t.Errorf("got another backend looked for, want none")
				}
				r.wantLost()
			})
		})
	}
}

func TestWithoutResumeALostBackendEndsTheSession(t *testing.T) {
	for how, die := range deaths {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(replay.Unacked)
				s.ResumeTimeout = 0
				r := start(t, setup{settings: s})
				die(r.backend)
				r.wantEnd(time.Minute, registry.BackendLost, "1014 backend connection lost", "-")
				r.wantLost(firstUpstream)
			})
		})
	}
}

func TestASearchThatFailsForGoodEndsTheSession(t *testing.T) {
	for _, test := range []struct {
		name   string
		is     outcome
		reason registry.Reason
		client string
	}{
		{"refused", refuses, registry.Refused, "1008 refused by the backend"},
		{"none", none, registry.BackendLost, "1014 backend connection lost"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(replay.Unacked)})
				r.then(dial{is: fails}, dial{is: fails}, dial{is: test.is, after: time.Second})
				r.backend.crash()
				r.wantEnd(time.Minute, test.reason, test.client, "-")
			})
		})
	}
}

// Pauses are random between nothing and a bound that doubles.
func TestDialsAreSpreadByFullJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 200
		s := resuming(replay.Unacked)
		s.ResumeTimeout = time.Hour
		reg := registry.New()
		var first []time.Duration
		most := map[int]time.Duration{}
		for range n {
			r := startIn(t, reg, setup{settings: s})
			r.pass(time.Minute)
			r.always(dial{is: fails})
			r.backend.crash()
			r.pass(2 * time.Minute)
			search := r.asked()[0]
			last := search.at
			bound := s.ResumeMin
			for i, a := range search.attempts {
				gap := a.at.Sub(last)
				if a.n != i+1 {
					t.Fatalf("got attempt %d as the %dth, want them counted from 1", a.n, i+1)
				}
				if gap < 0 || gap > bound {
					t.Fatalf("got a pause of %v before attempt %d, want 0 to %v", gap, a.n, bound)
				}
				most[i] = max(most[i], gap)
				if i == 0 {
					first = append(first, gap)
				}
				last, bound = a.at, min(2*bound, s.ResumeMax)
			}
			r.rec.Close(registry.Ending{Reason: registry.Admin})
		}
		bound := s.ResumeMin
		for i := range 12 {
			if most[i] < bound*8/10 {
				t.Errorf("got pauses up to %v before attempt %d, want up to %v", most[i], i+1, bound)
			}
			bound = min(2*bound, s.ResumeMax)
		}
		low := 0
		for _, gap := range first {
			if gap < s.ResumeMin/2 {
				low++
			}
		}
		if low < n/3 || low > n*2/3 {
			t.Errorf("got %d of %d first pauses in the lower half, want about half", low, n)
		}
	})
}

func TestPoison(t *testing.T) {
	for _, test := range []struct {
		name   string
		limit  int
		deaths int
		ends   bool
	}{{"limit 3", 3, 3, true}, {"limit 3, two die", 3, 2, false}, {"limit 1", 1, 1, true}, {"no limit", 0, 20, false}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(replay.Unacked)
				s.ResumeLimit, s.ResumeTimeout = test.limit, time.Hour
				// Each reads the message whole and breaks before it answers.
				deadly := manners{mute: true, dies: (*peer).crash, after: 40}
				r := start(t, setup{settings: s, backend: deadly, answers: true})
				for range test.deaths - 1 {
					r.then(dial{is: fails}, dial{is: fails}, dial{manners: deadly})
				}
				message := "a message that is enough to kill a backend"
				r.client.send(r.client.text(message))
				if test.ends {
					r.wantEnd(time.Hour, registry.Poison, "1011 a message breaks the backends", "-")
					if got := len(r.used()); got != test.deaths {
						t.Errorf("got %d backends killed, want %d", got, test.deaths)
					}
					return
				}
				r.pass(10 * time.Minute)
				r.wantKept(promise{mode: replay.Unacked, sent: []string{message}})
				if !r.live() || len(r.used()) != test.deaths+1 {
					t.Errorf("got state %v (%s) and %d backends, want it open with the %dth", r.rec.State(), r.rec.Ending().Reason, len(r.used()), test.deaths+1)
				}
			})
		})
	}
}

func TestAHundredResumesLeaveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: resuming(replay.Unacked), answers: true})
		measure := func() (goroutines int, bytes uint64) {
			for _, p := range r.used()[:len(r.used())-1] {
				p.leave()
				p.raw, p.frames, p.sent = nil, nil, nil
			}
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return runtime.NumGoroutine(), m.HeapAlloc
		}
		round := func(i int) {
			r.client.send(r.client.text(fmt.Sprint("message ", i)), r.client.frame(true, 0, ws.OpPing, []byte(fmt.Sprint("ping ", i))))
			r.pass(10 * time.Second)
			r.latest().crash()
			r.client.send(r.client.text(fmt.Sprint("message while held ", i)))
			r.pass(20 * time.Second)
			if !r.live() {
				t.Fatalf("got state %v (%s) after resume %d, want it open", r.rec.State(), r.rec.Ending().Reason, i)
			}
		}
		for i := range 10 {
			round(i)
		}
		goroutines, bytes := measure()
		for i := range 100 {
			round(10 + i)
		}
		after, bytesAfter := measure()
		if after != goroutines {
			t.Errorf("got %d goroutines after 100 resumes, want %d", after, goroutines)
		}
		// What the test itself keeps of each is a few KiB.
		if grown := int64(bytesAfter) - int64(bytes); grown > 100*16<<10 {
			t.Errorf("got %d bytes more after 100 resumes, want none", grown)
		}
		if got := r.reg.ReplayMemory.Used(); got != 0 {
			t.Errorf("got %d bytes of replay memory in use, want none", got)
		}
	})
}
