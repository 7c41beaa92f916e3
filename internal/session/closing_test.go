// This file tests how an end is carried out: past peers that do not read, reasons
// that come second, and ends that come early.

package session

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestAPeerThatDoesNotReadHoldsTheEndUpForFiveSecondsAtMost(t *testing.T) {
	fill := func(from, to *peer) {
		to.stall()
		from.send(from.binary(300_000))
		synctest.Wait()
	}
	jams := map[string]func(r *rig){
		"client":  func(r *rig) { fill(r.backend, r.client) },
		"backend": func(r *rig) { fill(r.client, r.backend) },
		"both": func(r *rig) {
			fill(r.backend, r.client)
			fill(r.client, r.backend)
		},
	}
	for name, jam := range jams {
		for _, reason := range []registry.Reason{registry.Admin, registry.Shutdown, registry.Lifetime, registry.ClientGone, registry.BackendLost} {
			t.Run(fmt.Sprintf("%s, %s", name, reason), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := start(t, setup{})
					jam(r)
					r.rec.Close(registry.Ending{Reason: reason})
					r.wait(time.Hour)
					r.wantTime(0, registry.ClosingTimeout)
					if got := r.rec.Ending().Reason; got != reason {
						t.Errorf("got reason %q, want %q", got, reason)
					}
					// The peer that reads was told.
					told := map[string]*peer{"client": r.backend, "backend": r.client}[name]
					gone := map[registry.Reason]*peer{registry.ClientGone: r.client, registry.BackendLost: r.backend}[reason]
					if told != nil && told != gone && told.farewell(t) == "-" {
						t.Error("got the peer that reads told nothing, want a close frame")
					}
				})
			})
		}
	}
}

func TestAWriteThatFailsWhileClosingDoesNotPostponeItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{})
		for from, to := range map[*peer]*peer{r.client: r.backend, r.backend: r.client} {
			to.stall()
			from.send(from.binary(300_000))
		}
		synctest.Wait()
		r.rec.Close(registry.Ending{Reason: registry.Admin})
		r.pass(4600 * time.Millisecond)
		r.backend.conn.Reset()
		r.wait(time.Minute)
		r.wantTime(0, registry.ClosingTimeout)
	})
}

func TestAStalledClientThatReadsAgainGetsItsDataAndTheCloseFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{})
		r.client.stall()
		r.backend.send(r.backend.text("first"), r.backend.binary(60_000), r.backend.binary(60_000), r.backend.text("last"))
		r.backend.sendClose(1000, "done")
		r.pass(time.Second)
		r.client.resume()
		r.wantEnd(time.Hour, registry.BackendClosed, "1000 done", "1000 done")
		if got, _ := r.client.messages(); len(got) != 4 || got[3] != "last" {
			t.Errorf("got %d messages, want the 4 sent before the close frame", len(got))
		}
	})
}

func TestTheFirstReasonWins(t *testing.T) {
	again := map[string]func(r *rig){
		"admin":         func(r *rig) { r.rec.Close(registry.Ending{Reason: registry.Admin, Code: 4999, Text: "late"}) },
		"client closes": func(r *rig) { r.client.sendClose(4001, "late") },
		"client resets": func(r *rig) { r.client.conn.Reset() },
		"backend FIN":   func(r *rig) { r.backend.sendFIN() },
		"planned end": func(r *rig) {
			r.rec.CloseAt(time.Now(), registry.Ending{Reason: registry.Orphan})
		},
		"offence": func(r *rig) { r.backend.send(r.client.text("masked")) },
	}
	for _, e := range endings {
		for second, trigger := range again {
			t.Run(e.name+", then "+second, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := e.begin(t, silent, silent)
					for deadline := time.Now().Add(2 * time.Hour); r.live() && time.Now().Before(deadline); {
						r.pass(100 * time.Millisecond)
					}
					r.pass(500 * time.Millisecond)
					trigger(r)
					if r.rec.Close(registry.Ending{Reason: registry.Admin}) {
						t.Error("got a second Close that won, want the first one alone")
					}
					r.wait(time.Minute)
					if got := r.rec.Ending().Reason; got != e.reason {
						t.Errorf("got reason %q, want the first one, %q", got, e.reason)
					}
					r.client.farewell(t) // at most one close frame, nothing after it
					r.backend.farewell(t)
					r.wantTime(e.noticed+time.Second, registry.ClosingTimeout)
				})
			})
		}
	}
}

func TestCloseFramesThatCrossAreBothPassedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{})
		r.client.sendClose(4001, "client")
		r.backend.sendClose(4002, "backend")
		r.wait(time.Second)
		if got := r.client.farewell(t); got != "4002 backend" {
			t.Errorf("got client told %q, want what the backend said", got)
		}
		if got := r.backend.farewell(t); got != "4001 client" {
			t.Errorf("got backend told %q, want what the client said", got)
		}
	})
}

func TestTheServerClosesTheClientsConnectionFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// The backend answers the close frame, and keeps its connection.
		r := start(t, setup{backend: manners{silent: true}})
		r.client.sendClose(1000, "")
		synctest.Wait()
		r.backend.send(r.backend.closeFrame(1000, ""))
		synctest.Wait()
		if r.client.ending() == nil {
			t.Error("got the client's connection open after both close frames, want it closed at once")
		}
		if got := r.wait(time.Hour); got > 1100*time.Millisecond {
			t.Errorf("got Run back after %v, want a second for the backend", got)
		}
	})
}

func TestShutdownCutsWhatIsLeftWhenItsTimeIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{})
		r.client.stall()
		r.backend.send(r.backend.binary(300_000))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if cut := r.reg.Shutdown(ctx); cut != 1 {
			t.Errorf("got %d cut, want 1", cut)
		}
		if got := r.wait(time.Minute); got > 0 {
			t.Errorf("got Run back %v after the cut, want at once", got)
		}
		r.wantTold(registry.Shutdown, "-", "1001")
	})
}

func TestAnEndThatCameBeforeTheSessionRan(t *testing.T) {
	for _, test := range []struct {
		name            string
		end             registry.Ending
		client, backend string
	}{
		{"shutdown", registry.Ending{Reason: registry.Shutdown}, "1012 server shutting down", "1001"},
		{"admin", registry.Ending{Reason: registry.Admin, Code: 4000, Text: "moved"}, "4000 moved", "1001"},
		{"orphan", registry.Ending{Reason: registry.Orphan}, "1001 route removed", "1001"},
	} {
		for when, early := range map[string]bool{"before the handover": true, "after it": false} {
			t.Run(test.name+" "+when, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := prepare(t, registry.New(), setup{})
					if !r.rec.Open("") {
						t.Fatal("got Open refused, want it open")
					}
					if early {
						r.rec.Close(test.end)
					}
					r.rec.Handover(r)
					if !early {
						r.rec.Close(test.end)
					}
					go r.run()
					r.wantEnd(time.Second, test.end.Reason, test.client, test.backend)
					if r.lasting > 0 {
						t.Errorf("got Run back after %v, want at once", r.lasting)
					}
				})
			})
		}
	}
}

// A client may be told the end in the middle of an upload: it is not given up
// while it goes on, and what it had sent before its own close frame is delivered.
func TestAClientThatStillSendsIsNotGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{})
		r.client.behave(func(is *manners) { is.silent = true })
		r.backend.sendClose(1000, "")
		const messages = 30
		for range messages {
			r.client.send(r.client.text("part"))
			r.pass(100 * time.Millisecond)
		}
		r.client.sendClose(1000, "")
		r.wait(time.Minute)
		if got, _ := r.backend.messages(); len(got) != messages {
			t.Errorf("got %d messages delivered, want %d", len(got), messages)
		}
	})
}

// What was read and waits behind a write that blocks is not passed on yet, though
// the socket says that its peer has finished.
func TestWhatWaitsBehindAWriteThatBlocksComesBeforeTheEnd(t *testing.T) {
	for name, last := range map[string]func(p *peer) []byte{
		"a close frame": func(p *peer) []byte { return p.closeFrame(4000, "bye") },
		"a ping and a close frame": func(p *peer) []byte {
			return slices.Concat(p.frame(true, 0, ws.OpPing, []byte("ping")), p.closeFrame(4000, "bye"))
		},
		"a message and a close frame": func(p *peer) []byte { return slices.Concat(p.text("last"), p.closeFrame(4000, "bye")) },
	} {
		t.Run(name, func(t *testing.T) {
			bothWays(t, setup{buffer: 1000}, func(t *testing.T, r *rig, from, to *peer) {
				to.stall()
				from.send(from.binary(990))
				synctest.Wait()
				from.mu.Lock()
				from.sentClose = true
				wire := slices.Concat(from.text("one that blocks"), last(from))
				from.mu.Unlock()
				from.send(wire)
				from.sendFIN()
				r.pass(3 * time.Second)
				to.resume()
				r.wait(time.Minute)
				if got := r.rec.Ending().Reason; got != registry.ClientClosed && got != registry.BackendClosed {
					t.Errorf("got reason %q, want the close frame heard", got)
				}
				if got := to.farewell(t); got != "4000 bye" {
					t.Errorf("got the other told %q, want what was sent", got)
				}
			})
		})
	}
}
