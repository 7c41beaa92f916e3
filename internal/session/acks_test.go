// This file tests acknowledgements: when the session asks a backend what it has
// read, and what its answers, or their absence, do.

package session

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// ownPings returns when the session's own pings came.
func (r *rig) ownPings(p *peer) (at []time.Time) {
	for _, f := range p.received() {
		if f.head.OpCode == ws.OpPing && r.session.own.has(f.payload) {
			at = append(at, f.at)
		}
	}
	return at
}

func TestAPingFollowsAMessageAndItsPongFreesIt(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(mode), backend: manners{mute: true}, answers: true})
				r.client.send(r.client.text("one"))
				r.pass(time.Millisecond)
				pings := r.ownPings(r.backend)
				if mode == replay.Unsent || mode == replay.Off {
					if len(pings) != 0 || r.rec.View().Buffered != 0 {
						t.Errorf("got %d pings and %d bytes kept, want none", len(pings), r.rec.View().Buffered)
					}
					return
				}
				if len(pings) != 1 {
					t.Fatalf("got %d pings, want one right after the message", len(pings))
				}
				if got := r.rec.View().Buffered; (got > 0) != (mode == replay.Unacked) {
					t.Errorf("got %d bytes kept before the pong", got)
				}
				frames := r.backend.received()
				r.backend.send(r.backend.frame(true, 0, ws.OpPong, frames[len(frames)-1].payload))
				r.pass(time.Millisecond)
				if got := r.rec.View().Buffered; got != 0 {
					t.Errorf("got %d bytes kept after the pong, want none", got)
				}
				r.pass(20 * time.Second)
				if got := len(r.ownPings(r.backend)); got != 1 {
					t.Errorf("got %d pings, want one while nothing is outstanding", got)
				}
			})
		})
	}
}

func TestPingsThatAskArePaced(t *testing.T) {
	for _, test := range []struct {
		name  string
		size  int
		every time.Duration
		most  int // in ten seconds
		least int
	}{
		{"small messages", 100, 10 * time.Millisecond, 11, 9},
		{"rare messages", 100, 4 * time.Second, 2, 2},
		{"64 KiB in a second", 6500, 100 * time.Millisecond, 22, 9},
		{"a megabyte in a second", 10_000, 10 * time.Millisecond, 170, 100},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(replay.Unacked), answers: true})
				for range int(10 * time.Second / test.every) {
					r.client.send(r.client.binary(test.size))
					r.pass(test.every)
				}
				if got := len(r.ownPings(r.backend)); got < test.least || got > test.most {
					t.Errorf("got %d pings in ten seconds, want %d to %d", got, test.least, test.most)
				}
				r.pass(3 * time.Second)
				if got := r.rec.View().Buffered; got != 0 {
					t.Errorf("got %d bytes kept, want none", got)
				}
			})
		})
	}
}

func TestALostPongIsAskedForAgain(t *testing.T) {
	for name, speaks := range map[string]bool{"other frames come": true, "nothing comes": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(replay.Unacked)
				s.PingInterval = time.Hour
				r := start(t, setup{settings: s, backend: manners{mute: true}, answers: true})
				r.pass(10 * time.Second)
				r.client.send(r.client.text("one"))
				began := time.Now()
				for range 28 {
					r.pass(time.Second)
					if speaks {
						r.backend.send(r.backend.text("tick"))
					}
				}
				pings := r.ownPings(r.backend)
				if !speaks {
					if len(pings) != 1 {
						t.Errorf("got %d pings, want one", len(pings))
					}
					r.pass(4 * time.Second)
					if got := r.asked(); len(got) != 1 {
						t.Errorf("got it not lost after ping_timeout of silence, want it lost")
					}
					return
				}
				if len(pings) != 2 {
					t.Fatalf("got %d pings, want the lost one repeated once", len(pings))
				}
				if got := pings[1].Sub(began); got < 15*time.Second || got > 17*time.Second {
					t.Errorf("got it repeated after %v, want 15s", got)
				}
				r.backend.behave(func(is *manners) { is.mute = false })
				r.backend.send(r.backend.frame(true, 0, ws.OpPong, r.backend.received()[len(r.backend.received())-1].payload))
				r.pass(time.Second)
				if got := r.rec.View().Buffered; got != 0 || !r.live() {
					t.Errorf("got %d bytes kept, state %v, want none", got, r.rec.State())
				}
			})
		})
	}
}

func TestNoPingAsksABackendThatIsNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := resuming(replay.Unacked)
		s.WriteTimeout = 0
		r := start(t, setup{settings: s, answers: true})
		r.pass(time.Minute)
		r.client.stall()
		r.backend.send(r.backend.binary(200_000))
		r.pass(time.Second)
		before := len(r.ownPings(r.backend))
		for range 60 {
			r.client.send(r.client.text("tick"))
			r.pass(time.Second)
		}
		if got := len(r.ownPings(r.backend)) - before; got != 0 {
			t.Errorf("got %d pings while the backend was not read, want none", got)
		}
		r.client.resume()
		r.pass(10 * time.Second)
		if got := r.rec.View().Buffered; got != 0 || !r.live() {
			t.Errorf("got %d bytes kept, state %v, want none after the client has read", got, r.rec.State())
		}
	})
}

func TestWithoutPongsTheKernelAcknowledges(t *testing.T) {
	for _, off := range []bool{true, false} {
		t.Run(fmt.Sprintf("ping_interval off %v", off), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(replay.Unacked)
				if off {
					s.PingInterval = 0
				}
				r := start(t, setup{settings: s, backend: manners{mute: true}})
				for range 300 {
					r.client.send(r.client.text("tick"))
					r.pass(time.Second)
				}
				if got := r.rec.View().Buffered; got == 0 || got > 40*70 {
					t.Errorf("got %d bytes kept, want those of the last 30 to 62 seconds", got)
				}
				r.pass(70 * time.Second)
				if got := r.rec.View().Buffered; got != 0 || !r.live() {
					t.Errorf("got %d bytes kept, state %v (%s), want none", got, r.rec.State(), r.rec.Ending().Reason)
				}
				pings := len(r.ownPings(r.backend))
				if off && (pings != 0 || len(r.warned) != 0) {
					t.Errorf("got %d pings and warnings for %v, want none", pings, r.warned)
				}
				if !off && (len(r.warned) != 1 || r.warned[0] != firstUpstream || pings > 20) {
					t.Errorf("got warnings for %v and %d pings, want one, and heartbeats", r.warned, pings)
				}
				// Bytes that the kernel has not acknowledged stay.
				r.backend.stall()
				for range 3 {
					r.client.send(r.client.binary(60_000))
				}
				r.pass(29 * time.Second)
				if got := r.rec.View().Buffered; got == 0 {
					t.Error("got nothing kept of what is not acknowledged, want it kept")
				}
			})
		})
	}
}

// A backend may answer several pings with the last one's pong, of the session's
// own pings and of the client's.
func TestCoalescedPongsAnswerEachPingOnce(t *testing.T) {
	for every := 1; every < 9; every++ {
		t.Run(fmt.Sprintf("only each %d. is answered", every), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(replay.Unacked), backend: manners{mute: true}, answers: true})
				var pings []string
				answered := 0
				for i := range 40 {
					r.client.send(r.client.text("tick"))
					if i%3 == 0 {
						pings = append(pings, fmt.Sprint("ping ", i))
						r.client.send(r.client.frame(true, 0, ws.OpPing, []byte(pings[len(pings)-1])))
					}
					r.pass(time.Second)
					var all [][]byte
					for _, f := range r.backend.received() {
						if f.head.OpCode == ws.OpPing {
							all = append(all, f.payload)
						}
					}
					if len(all) >= answered+every {
						answered = len(all)
						r.backend.send(r.backend.frame(true, 0, ws.OpPong, all[answered-1]))
					}
				}
				r.latest().crash()
				r.resumed()
				r.pass(time.Second)
				r.wantPonged(pings)
			})
		})
	}
}

// While the client takes nothing its pings are answered here, also if an earlier one is
// on its way to the backend.
func TestAPingOfASlowClientBehindAnotherIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{buffer: 100, backend: manners{stalled: true}})
		r.client.send(r.client.frame(true, 0, ws.OpPing, []byte("a")))
		r.pass(time.Second)
		r.client.stall()
		r.backend.send(r.backend.binary(1000))
		r.pass(time.Second)
		r.client.send(r.client.frame(true, 0, ws.OpPing, []byte("b")))
		r.pass(time.Second)
		r.backend.resume()
		r.client.resume()
		r.pass(10 * time.Second)
		wantPonged(t, r.client, []string{"a", "b"}, true)
	})
}
