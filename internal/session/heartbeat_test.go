// This file tests heartbeats: when pings come, who counts as dead and when, and
// what suspends them.

package session

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

const day = 24 * time.Hour

// wantGaps checks that times lie between least and most apart, from from on.
func wantGaps(t *testing.T, who string, from time.Time, at []time.Time, least, most time.Duration) {
	t.Helper()
	for i, now := range at {
		if gap := now.Sub(from); gap < least || gap > most {
			t.Errorf("%s: got ping %d after %v, want it between %v and %v after the one before", who, i, gap, least, most)
			return
		}
		from = now
	}
}

func TestAPingComesOnEachLegEvery27To30Seconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: defaults})
		r.pass(day)
		for who, p := range map[string]*peer{"client": r.client, "backend": r.backend} {
			at := p.pings()
			wantGaps(t, who, r.began, at, 27*time.Second, 30*time.Second)
			if n := len(at); n < 2880 || n > 3200 {
				t.Errorf("%s: got %d pings in a day, want 2880 to 3200", who, n)
			}
			for _, f := range p.received() {
				if f.head.OpCode != ws.OpPing || !r.session.own.has(f.payload) || f.head.Masked == p.masked {
					t.Fatalf("%s: got %v %x, want our pings and nothing else, masked for the backend", who, f.head, f.payload)
				}
			}
		}
		if !r.live() {
			t.Errorf("got the end (%s), want a client that answers alive after a day", r.rec.Ending().Reason)
		}
		if !r.upstream.Answers.Load() {
			t.Error("got an upstream that has never answered, want it known to answer")
		}
	})
}

func TestPingsComeBetweenDataToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: defaults})
		for range 1200 {
			r.client.send(r.client.text("tick"))
			r.backend.send(r.backend.text("tock"))
			r.pass(700 * time.Millisecond)
		}
		// Data makes the clock look every second.
		wantGaps(t, "client", r.began, r.client.pings(), 27*time.Second, 31*time.Second)
		wantGaps(t, "backend", r.began, r.backend.pings(), 27*time.Second, 31*time.Second)
		if got, _ := r.client.messages(); len(got) != 1200 {
			t.Errorf("got %d messages, want 1200", len(got))
		}
	})
}

func TestASilentClientIsEnded30To61SecondsAfterItsLastByte(t *testing.T) {
	for _, last := range []time.Duration{0, time.Second, 20 * time.Second, 26 * time.Second, 28 * time.Second, 31 * time.Second, 10 * time.Minute} {
		for name, s := range map[string]Settings{
			"30s 30s":           defaults,
			"interval shorter":  {PingInterval: 10 * time.Second, PingTimeout: 30 * time.Second},
			"interval much so":  {PingInterval: 2 * time.Second, PingTimeout: 30 * time.Second},
			"timeout shortened": {PingInterval: 30 * time.Second, PingTimeout: 5 * time.Second},
		} {
			t.Run(last.String()+", "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := start(t, setup{settings: s})
					r.pass(last)
					r.client.behave(func(is *manners) { is.mute = true })
					if last > 0 {
						r.client.send(r.client.text("the last"))
					}
					r.wantEnd(time.Hour, registry.PingTimeout, "1001 ping timeout", "1001")
					least, most := s.PingTimeout, s.PingInterval+s.PingTimeout+activePeriod
					if got := r.endedAt.Sub(r.began) - last; got < least || got > most {
						t.Errorf("got the end %v after the last byte, want %v to %v", got, least, most)
					}
				})
			})
		}
	}
}

func TestAnyByteIsASignOfLife(t *testing.T) {
	for name, drip := range map[string]func(p *peer) func(i int) []byte{
		"a byte of a frame at a time": func(p *peer) func(int) []byte {
			whole := p.binary(400)
			return func(i int) []byte { return whole[i : i+1] }
		},
		"pings":   func(p *peer) func(int) []byte { return func(int) []byte { return p.frame(true, 0, ws.OpPing, nil) } },
		"pongs":   func(p *peer) func(int) []byte { return func(int) []byte { return p.frame(true, 0, ws.OpPong, nil) } },
		"message": func(p *peer) func(int) []byte { return func(int) []byte { return p.text("I live") } },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mute := manners{mute: true}
				r := start(t, setup{settings: defaults, client: mute, backend: mute, answers: true})
				next, back := drip(r.client), drip(r.backend)
				for i := range 180 {
					r.pass(20 * time.Second)
					r.client.send(next(i))
					r.backend.send(back(i))
				}
				if !r.live() {
					t.Errorf("got the end (%s) after %v, want it alive after an hour", r.rec.Ending().Reason, r.lasting)
				}
			})
		})
	}
}

func TestABackendThatNeverAnsweredAPingIsNotJudgedBySilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: defaults, backend: manners{mute: true}})
		r.pass(day)
		if !r.live() {
			t.Errorf("got the end (%s) after %v, want it alive after a day", r.rec.Ending().Reason, r.lasting)
		}
		wantGaps(t, "backend", r.began, r.backend.pings(), 27*time.Second, 30*time.Second)
	})
}

func TestABackendThatStopsAnsweringIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: defaults})
		r.pass(time.Hour)
		r.backend.behave(func(is *manners) { is.mute = true })
		muted := time.Now()
		r.wantEnd(time.Hour, registry.BackendLost, "1014 backend connection lost", "-")
		if got := r.endedAt.Sub(muted); got < 30*time.Second || got > 61*time.Second {
			t.Errorf("got the end after %v, want 30s to 61s", got)
		}
	})
}

// Its pings, unanswered, leave the session room for one of its own.
func TestAClientThatPingsADeadBackendDoesNotKeepIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: defaults})
		for len(r.backend.pings()) == 0 {
			r.pass(time.Second)
		}
		r.backend.behave(func(is *manners) { is.mute = true })
		muted := time.Now()
		for n := 0; r.live() && time.Since(muted) < 5*time.Minute; n++ {
			r.client.send(r.client.frame(true, 0, ws.OpPing, fmt.Append(nil, n)))
			r.pass(300 * time.Millisecond)
		}
		r.wantEnd(time.Second, registry.BackendLost, "1014 backend connection lost", "-")
		if got := r.endedAt.Sub(muted); got < 30*time.Second || got > 61*time.Second {
			t.Errorf("got the end after %v, want 30s to 61s", got)
		}
	})
}

// Its kernel goes on taking what the backend sends, and something is on its way
// whenever the clock looks.
func TestAFrozenClientIsFoundWhileItsKernelTakesData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: defaults, client: manners{mute: true}})
		r.legs[clientSide].out.update(func() { r.legs[clientSide].out.under = 20 })
		for range 90 {
			r.pass(time.Second)
			if r.live() {
				r.backend.send(r.backend.text("tick"))
			}
		}
		r.wantEnd(10*time.Second, registry.PingTimeout, "1001 ping timeout", "1001")
	})
}

func TestAClientThatAnswersWithinThePingTimeoutLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: Settings{PingInterval: time.Second, PingTimeout: 30 * time.Second}, client: manners{mute: true}})
		// The client answers every ping 29 seconds late.
		for range 100 {
			r.pass(28900 * time.Millisecond)
			r.client.send(r.client.frame(true, 0, ws.OpPong, r.ownPing()))
		}
		if !r.live() {
			t.Errorf("got the end (%s) after %v, want it alive", r.rec.Ending().Reason, r.lasting)
		}
	})
}

func TestHeartbeatsAreSuspendedWhileTheClientIsNotRead(t *testing.T) {
	for name, mute := range map[string]bool{"client that answers again": false, "client that stays silent": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := defaults
				s.WriteTimeout = 0
				r := start(t, setup{settings: s})
				r.pass(time.Minute)
				r.backend.stall()
				r.client.send(r.client.binary(300_000))
				synctest.Wait()
				r.client.behave(func(is *manners) { is.mute = mute })
				before := len(r.client.pings())
				r.pass(10 * time.Minute)
				if !r.live() {
					t.Fatalf("got the end (%s), want a client that is not read not judged", r.rec.Ending().Reason)
				}
				if got := len(r.client.pings()) - before; got > 0 {
					t.Errorf("got %d pings while the client was not read, want none", got)
				}
				r.backend.resume()
				resumed := time.Now()
				if !mute {
					r.pass(time.Hour)
					if !r.live() {
						t.Errorf("got the end (%s), want it alive", r.rec.Ending().Reason)
					}
					return
				}
				r.wantEnd(time.Hour, registry.PingTimeout, "1001 ping timeout", "1001")
				if got := r.endedAt.Sub(resumed); got < 30*time.Second || got > 61*time.Second {
					t.Errorf("got the end %v after reading was resumed, want 30s to 61s", got)
				}
			})
		})
	}
}

func TestHeartbeatsAreSuspendedWhileOurPingToTheOtherLegBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := defaults
		s.WriteTimeout = 0
		mute := manners{mute: true}
		r := start(t, setup{settings: s, client: mute, backend: mute})
		r.backend.stall()
		r.client.send(r.client.binary(defaultBuffer - 8)) // with its header all that fits
		r.pass(90 * time.Second)
		if got := r.legs[backendSide].room(); got != 0 {
			t.Fatalf("got room for %d bytes, want a ping that blocks", got)
		}
		if got := len(r.client.pings()); got != 1 || !r.live() {
			t.Fatalf("got %d pings (reason %q), want one, and a client that is not read not judged", got, r.rec.Ending().Reason)
		}
		r.backend.resume()
		r.wantEnd(time.Hour, registry.PingTimeout, "1001 ping timeout", "1001")
		if got := r.endedAt.Sub(r.began) - 90*time.Second; got < 30*time.Second || got > 61*time.Second {
			t.Errorf("got the end %v after reading was resumed, want 30s to 61s", got)
		}
	})
}

func TestHeartbeatsAreSuspendedWhileTheBackendIsNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := defaults
		s.WriteTimeout = 0
		// The client answers pings, but does not read the data: its pongs come
		// from the pings that were sent before.
		r := start(t, setup{settings: s, answers: true})
		r.pass(time.Minute)
		r.client.stall()
		r.backend.send(r.backend.binary(300_000))
		r.backend.behave(func(is *manners) { is.mute = true })
		synctest.Wait()
		before := len(r.backend.pings())
		for range 60 {
			r.client.send(r.client.text("I live"))
			r.pass(10 * time.Second)
		}
		if !r.live() {
			t.Fatalf("got the end (%s), want a backend that is not read not judged", r.rec.Ending().Reason)
		}
		if got := len(r.backend.pings()) - before; got > 0 {
			t.Errorf("got %d pings while the backend was not read, want none", got)
		}
		r.client.resume()
		resumed := time.Now()
		r.wantEnd(time.Hour, registry.BackendLost, "1014 backend connection lost", "-")
		if got := r.endedAt.Sub(resumed); got < 30*time.Second || got > 61*time.Second {
			t.Errorf("got the end %v after reading was resumed, want 30s to 61s", got)
		}
	})
}

func TestPingIntervalOffSendsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mute := manners{mute: true}
		r := start(t, setup{settings: Settings{PingTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second}, client: mute, backend: mute, answers: true})
		r.pass(day)
		if got := len(r.client.wire()) + len(r.backend.wire()); got != 0 {
			t.Errorf("got %d bytes, want none", got)
		}
		if !r.live() {
			t.Errorf("got the end (%s), want it alive after a day", r.rec.Ending().Reason)
		}
	})
}

func TestAShorterPingIntervalCountsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := defaults
		s.PingInterval = day
		r := start(t, setup{settings: s})
		r.pass(time.Hour)
		if got := len(r.client.pings()); got != 0 {
			t.Fatalf("got %d pings, want none yet", got)
		}
		changed := time.Now()
		r.change(defaults)
		r.pass(time.Hour)
		wantGaps(t, "client", changed, r.client.pings(), 27*time.Second, 30*time.Second)
		wantGaps(t, "backend", changed, r.backend.pings(), 27*time.Second, 30*time.Second)
		s.PingInterval = 0
		r.change(s)
		before := len(r.client.pings())
		r.pass(day)
		if got := len(r.client.pings()) - before; got != 0 {
			t.Errorf("got %d pings after they were turned off, want none", got)
		}
	})
}

// All connections of a route learn of a reload at the same instant.
func TestPingsThatAreTurnedOnComeAfterAnInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{})
		for range 2 {
			r.pass(time.Hour)
			changed, before := time.Now(), [2]int{len(r.client.pings()), len(r.backend.pings())}
			r.change(defaults)
			r.pass(10 * time.Minute)
			wantGaps(t, "client", changed, r.client.pings()[before[clientSide]:], 27*time.Second, 30*time.Second)
			wantGaps(t, "backend", changed, r.backend.pings()[before[backendSide]:], 27*time.Second, 30*time.Second)
			r.change(Settings{})
		}
	})
}

func TestAPingLeftWithABusyLegLandsBetweenFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: Settings{PingInterval: time.Second, PingTimeout: time.Minute}, buffer: 8 << 10})
		r.client.behave(func(is *manners) { is.chunk, is.every = 4<<10, 100*time.Millisecond })
		for range 40 {
			r.backend.send(r.backend.binary(60_000))
		}
		r.pass(time.Minute)
		var sizes []int
		messages, _ := r.client.messages()
		for _, m := range messages {
			sizes = append(sizes, len(m))
		}
		if want := slices.Repeat([]int{60_000}, len(sizes)); len(sizes) < 20 || !slices.Equal(sizes, want) {
			t.Errorf("got messages of %v bytes, want all of 60000", sizes)
		}
		if !r.live() {
			t.Errorf("got the end (%s), want it alive", r.rec.Ending().Reason)
		}
	})
}

// A backend's connection is judged by the pings that it was sent since its
// upstream is known to answer, not by those before.
func TestPingsFromBeforeTheFirstAnswerDoNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: defaults, backend: manners{mute: true}})
		r.pass(10 * time.Minute)
		r.upstream.Answers.Store(true) // by another connection
		r.pass(25 * time.Second)
		if !r.live() {
			t.Fatalf("got the end (%s) before a ping could be answered", r.rec.Ending().Reason)
		}
		r.wait(2 * time.Minute)
		if got := r.rec.Ending().Reason; got != registry.BackendLost {
			t.Errorf("got reason %q, want it lost after a ping without an answer", got)
		}
	})
}

func TestAHeartbeatIsNotPutOffByTheLastOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := prepare(t, registry.New(), setup{settings: defaults})
		r.session.jitter = 0
		r.open()
		go r.run()
		r.pass(day)
		wantGaps(t, "backend", r.began, r.backend.pings(), 27*time.Second, 30*time.Second)
	})
}
