// This file tests messages that are too big: who is told what, what was passed on
// before, and what a reload changes.

package session

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// announced is the header of a frame that the peer has only begun to send, with a
// payload as long as can be.
func announced(p *peer, op ws.OpCode) []byte {
	h := ws.Header{Fin: true, OpCode: op, Masked: p.masked, Length: 1<<63 - 1}
	var b strings.Builder
	_ = ws.WriteHeader(&b, h)
	return []byte(b.String())
}

// limited are settings with limits for both sides.
func limited(client, server int64) Settings {
	return Settings{ClientMaxMessage: client, ServerMaxMessage: server}
}

// sizeOffender is a side of a session that may send messages of 100 bytes.
type sizeOffender struct {
	name     string
	settings Settings
	from, to func(r *rig) *peer
	backend  string // what the backend is told when this side has offended
}

var sizeOffenders = []sizeOffender{
	{"client", limited(100, 0), func(r *rig) *peer { return r.client }, func(r *rig) *peer { return r.backend }, "1001"},
	{"backend", limited(0, 100), func(r *rig) *peer { return r.backend }, func(r *rig) *peer { return r.client }, "1009"},
}

func TestAMessageMayBeAsLargeAsItsSendersLimit(t *testing.T) {
	const text, more = ws.OpText, ws.OpContinuation
	filled := func(p *peer, fin bool, op ws.OpCode, size int) []byte {
		return p.frame(fin, 0, op, []byte(strings.Repeat("x", size)))
	}
	for _, test := range []struct {
		name   string
		frames func(p *peer) [][]byte
		sizes  []int // of the messages that arrive
		open   int   // bytes of the message that arrived in part
		ends   bool
	}{
		{"below", func(p *peer) [][]byte { return [][]byte{filled(p, true, text, 99)} }, []int{99}, 0, false},
		{"at", func(p *peer) [][]byte { return [][]byte{filled(p, true, text, 100), filled(p, true, text, 100)} }, []int{100, 100}, 0, false},
		{"above", func(p *peer) [][]byte { return [][]byte{filled(p, true, text, 101)} }, nil, 0, true},
		{"above after others", func(p *peer) [][]byte {
			return [][]byte{filled(p, true, text, 100), ping(p), filled(p, true, text, 101), p.text("never")}
		}, []int{100}, 0, true},
		{"fragments at", func(p *peer) [][]byte {
			return [][]byte{filled(p, false, text, 60), ping(p), filled(p, false, more, 0), filled(p, true, more, 40)}
		}, []int{100}, 0, false},
		{"fragments above", func(p *peer) [][]byte {
			return [][]byte{filled(p, false, text, 60), ping(p), filled(p, true, more, 41), p.text("never")}
		}, nil, 60, true},
		{"announced", func(p *peer) [][]byte { return [][]byte{announced(p, text)} }, nil, 0, true},
		{"announced after a fragment", func(p *peer) [][]byte { return [][]byte{filled(p, false, text, 1), announced(p, more)} }, nil, 1, true},
		{"compressed at", func(p *peer) [][]byte { return [][]byte{p.frame(true, 4, text, make([]byte, 100))} }, []int{100}, 0, false},
		{"compressed above", func(p *peer) [][]byte { return [][]byte{p.frame(true, 4, text, make([]byte, 101))} }, nil, 0, true},
	} {
		for _, side := range sizeOffenders {
			for name, arrive := range map[string]func(p *peer, frames [][]byte){
				"at once":      func(p *peer, frames [][]byte) { p.send([]byte(joined(frames))) },
				"one by one":   func(p *peer, frames [][]byte) { p.send(frames...) },
				"byte by byte": func(p *peer, frames [][]byte) { p.sendInPieces([]byte(joined(frames)), 1, time.Millisecond) },
			} {
				t.Run(fmt.Sprintf("%s, %s, %s", side.name, test.name, name), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						r := start(t, setup{settings: side.settings, compressed: true})
						from, to := side.from(r), side.to(r)
						arrive(from, test.frames(from))
						r.pass(time.Second)
						if test.ends {
							r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", side.backend)
						} else if !r.live() {
							t.Fatalf("got the end (%s), want it alive", r.rec.Ending().Reason)
						}
						wantSizes(t, to, test.sizes, test.open)
					})
				})
			}
		}
	}
}

func joined(frames [][]byte) string {
	var b strings.Builder
	for _, f := range frames {
		b.Write(f)
	}
	return b.String()
}

// wantSizes checks the sizes of the messages that a peer got, and how much it got
// of one whose end did not come.
func wantSizes(t *testing.T, p *peer, sizes []int, open int) {
	t.Helper()
	got, _ := p.messages()
	same := len(got) == len(sizes)
	for i := range got {
		same = same && len(got[i]) == sizes[i]
	}
	if !same {
		t.Errorf("got messages %.20q, want those of sizes %d", got, sizes)
	}
	if _, part := wholeMessages(p.wire()); len(part) != open {
		t.Errorf("got %d bytes of a message without an end, want %d", len(part), open)
	}
}

func TestOneSidesLimitIsNotTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: limited(100, 200_000)})
		r.backend.send(r.backend.binary(200_000))
		r.pass(time.Second)
		r.client.send(r.client.binary(100))
		r.pass(time.Second)
		if !r.live() {
			t.Fatalf("got the end (%s), want it alive", r.rec.Ending().Reason)
		}
		wantSizes(t, r.client, []int{200_000}, 0)
		wantSizes(t, r.backend, []int{100}, 0)
	})
}

// A large message is passed on as it comes, and refused as soon as it is announced.
func TestALargeMessageIsPassedOnUpToTheFrameThatIsTooMuch(t *testing.T) {
	for _, side := range sizeOffenders {
		t.Run(side.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: limited(300_000, 300_000)})
				from := side.from(r)
				from.send(from.frame(false, 0, ws.OpBinary, make([]byte, 299_999)))
				from.send(from.frame(false, 0, ws.OpContinuation, make([]byte, 2)))
				from.send(from.frame(true, 0, ws.OpContinuation, make([]byte, 100_000)))
				r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", side.backend)
				wantSizes(t, side.to(r), nil, 299_999)
			})
		})
	}
}

// The client was given the beginning of a message: it is told 1009 all the same, not
// that a message was cut off. What it has begun itself stays unfinished.
func TestABackendThatOffendsInTheMiddleOfMessages(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(mode)
				s.ServerMaxMessage = 100
				r := start(t, setup{settings: s, answers: true})
				r.client.send(r.client.frame(false, 0, ws.OpText, []byte("begun")))
				r.backend.send(r.backend.frame(false, 0, ws.OpText, make([]byte, 100)))
				synctest.Wait()
				r.backend.send(announced(r.backend, ws.OpContinuation))
				r.client.send(r.client.frame(true, 0, ws.OpContinuation, []byte(" and ended too late")))
				r.backend.sendFIN()
				r.wait(time.Minute)
				if got := r.rec.Ending().Reason; got != registry.TooBig || len(r.asked()) != 0 {
					t.Errorf("got reason %q and %d searches, want too_big and none", got, len(r.asked()))
				}
				if got := r.client.farewell(t); got != "1009 message too big" {
					t.Errorf("got client told %q, want 1009", got)
				}
				wantSizes(t, r.client, nil, 100)
			})
		})
	}
}

func TestAClientThatOffendsWhileHeldIsEnded(t *testing.T) {
	for _, mode := range modes[:3] { // under off it is not read while held
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(mode)
				s.ClientMaxMessage = 100
				r := start(t, setup{settings: s, answers: true})
				r.pass(10 * time.Second)
				r.always(dial{is: fails})
				r.backend.crash()
				synctest.Wait()
				r.client.send(r.client.text("kept"), r.client.frame(false, 0, ws.OpText, make([]byte, 50)))
				r.pass(time.Second)
				if r.rec.State() != registry.Held {
					t.Fatalf("got state %v, want held", r.rec.State())
				}
				r.client.send(r.client.frame(true, 0, ws.OpContinuation, make([]byte, 51)))
				r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", "-")
			})
		})
	}
}

// Under off a held client is not read: the next backend gets what is allowed.
func TestAClientThatOffendsBehindAPauseIsEndedAfterIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := resuming(replay.Off)
		s.ClientMaxMessage = 100
		r := start(t, setup{settings: s, answers: true})
		r.pass(10 * time.Second)
		r.then(dial{after: 5 * time.Second})
		r.backend.crash()
		synctest.Wait()
		r.client.send(r.client.text("kept"), r.client.binary(101))
		r.pass(time.Second)
		if r.rec.State() != registry.Held {
			t.Fatalf("got state %v (%s), want held", r.rec.State(), r.rec.Ending().Reason)
		}
		r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", "-")
		wantSizes(t, r.latest(), []int{4}, 0)
		if got := r.latest().farewell(t); got != "1001" {
			t.Errorf("got the next backend told %q, want 1001", got)
		}
	})
}

// What was taken is not measured again.
func TestWhatIsKeptIsReplayedWhateverTheLimitBecomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := resuming(replay.Unacked)
		s.ClientMaxMessage = 1000
		r := start(t, setup{settings: s, backend: manners{mute: true}, answers: true})
		r.pass(10 * time.Second)
		r.then(dial{after: 5 * time.Second})
		r.client.send(r.client.text(strings.Repeat("x", 1000)), r.client.frame(false, 0, ws.OpText, []byte(strings.Repeat("y", 600))))
		synctest.Wait()
		r.backend.crash()
		r.pass(time.Second)
		s.ClientMaxMessage = 10
		r.change(s)
		r.client.send(r.client.frame(true, 0, ws.OpContinuation, []byte(strings.Repeat("y", 400))))
		b := r.resumed()
		r.pass(time.Second)
		if !r.live() {
			t.Fatalf("got the end (%s), want it alive", r.rec.Ending().Reason)
		}
		wantSizes(t, b, []int{1000, 1000}, 0)
		r.client.send(r.client.text("eleven byte"))
		r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", "-")
	})
}

func TestAChangedLimitEndsNoMessageUnderWay(t *testing.T) {
	for _, side := range sizeOffenders {
		t.Run(side.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{})
				from, to := side.from(r), side.to(r)
				from.send(from.frame(false, 0, ws.OpText, make([]byte, 60)))
				synctest.Wait()
				r.change(limited(50, 50))
				from.send(from.frame(true, 0, ws.OpContinuation, make([]byte, 60)), from.text(strings.Repeat("x", 50)))
				synctest.Wait()
				wantSizes(t, to, []int{120, 50}, 0)
				r.change(limited(70, 70))
				from.send(from.text(strings.Repeat("x", 70)))
				synctest.Wait()
				wantSizes(t, to, []int{120, 50, 70}, 0)
				r.change(limited(0, 0))
				from.send(from.binary(200_000))
				r.pass(time.Second)
				wantSizes(t, to, []int{120, 50, 70, 200_000}, 0)
				r.change(side.settings)
				from.send(from.binary(101))
				r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", side.backend)
			})
		})
	}
}

func TestALimitCountsForWhatCameWithTheHandshake(t *testing.T) {
	for _, side := range sizeOffenders {
		t.Run(side.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				early := func(p *peer) []byte { return p.sendEarly([][]byte{p.text("first"), p.binary(101)}, nil) }
				with := setup{settings: side.settings}
				if side.name == "client" {
					with.earlyClient = early
				} else {
					with.earlyBackend = early
				}
				r := start(t, with)
				r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", side.backend)
				wantSizes(t, side.to(r), []int{5}, 0)
			})
		})
	}
}

// What a lost backend had sent is read to its end while the next one is there
// already, which has done nothing wrong.
func TestABackendIsNotToldWhatTheOneBeforeItDid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := resuming(replay.Unacked)
		s.PingInterval, s.WriteTimeout = 0, 0
		s.ServerMaxMessage = 3000
		r := start(t, setup{settings: s, buffer: 1000, client: manners{stalled: true}, earlyBackend: func(p *peer) []byte {
			return p.sendEarly([][]byte{p.binary(3000), announced(p, ws.OpBinary)}, nil)
		}})
		r.pass(time.Minute)
		r.backend.crash()
		next := r.resumed()
		if !r.live() {
			t.Fatalf("got the end (%s) before the client has read that far: the test is void", r.rec.Ending().Reason)
		}
		r.client.resume()
		r.wantEnd(time.Minute, registry.TooBig, "1009 message too big", "-")
		if got := next.farewell(t); got != "1001" {
			t.Errorf("got the next backend told %q, want 1001", got)
		}
		wantSizes(t, r.client, []int{3000}, 0)
	})
}

// wantNoneTooBig checks that what arrived of a message was within a limit that was
// in force.
func (l *life) wantNoneTooBig(way string, to *peer) {
	l.t.Helper()
	most := 0
	for _, s := range l.settings {
		limit := int(s.ServerMaxMessage)
		if to == l.backend {
			limit = int(s.ClientMaxMessage)
		}
		if limit == 0 {
			return
		}
		most = max(most, limit)
	}
	whole, part := wholeMessages(to.wire())
	for _, m := range append(whole, part) {
		if len(m) > most {
			l.t.Errorf("%s: got %d bytes of a message, want at most %d", way, len(m), most)
		}
	}
}
