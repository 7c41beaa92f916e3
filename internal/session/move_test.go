// This file tests migration: a session moves to another backend while the one
// it has still serves.

package session

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// startMove opens a session with a second upstream.
func startMove(t *testing.T, mode replay.Mode) *rig {
	t.Helper()
	r := start(t, setup{settings: resuming(mode), answers: true, others: []string{"b:80"}})
	r.pass(time.Minute)
	return r
}

func (r *rig) move() {
	r.t.Helper()
	if err := r.rec.Move(); err != nil {
		r.t.Fatalf("got %v, want a move begun", err)
	}
	synctest.Wait()
}

// wantMoved checks that the session is with the second upstream.
func (r *rig) wantMoved() *peer {
	r.t.Helper()
	if v := r.rec.View(); !r.live() || v.Upstream != "b:80" || r.places(firstUpstream) != 0 || r.places("b:80") != 1 {
		r.t.Fatalf("got state %v (%s) at %s, want it open at b:80", r.rec.State(), r.rec.Ending().Reason, v.Upstream)
	}
	return r.latest()
}

func TestAMoveLosesAndRepeatsNothing(t *testing.T) {
	for _, mode := range modes {
		for _, every := range []time.Duration{time.Millisecond, 30 * time.Millisecond, 500 * time.Millisecond} {
			t.Run(fmt.Sprintf("%v, a message every %v", mode, every), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := startMove(t, mode)
					messages := numbered(int(20*time.Second/every)/4, 20)
					var wire []byte
					size := 0
					for _, m := range messages {
						frame := r.client.text(m)
						wire, size = append(wire, frame...), len(frame)
					}
					r.client.sendInPieces(wire, size/2+1, every)
					for i := range 200 {
						r.backend.send(r.backend.text(fmt.Sprint("from the old ", i)))
						if i == 20 {
							r.then(dial{after: 300 * time.Millisecond})
							r.move()
						}
						r.pass(10 * time.Millisecond)
					}
					r.pass(30 * time.Second)
					b := r.wantMoved()
					r.wantLost()
					r.wantKept(promise{mode: mode, sent: messages})
					r.wantPassed()
					if got := r.backend.farewell(t); got != "1001" {
						t.Errorf("got the old backend told %q, want 1001", got)
					}
					old, _ := r.backend.messages()
					next, _ := b.messages()
					if got := slices.Concat(old, next); !slices.Equal(got, messages) {
						t.Errorf("got %d messages at the old and %d at the new backend, want each of %d once", len(old), len(next), len(messages))
					}
					search := r.asked()[0]
					if want := (Interruption{Upstream: firstUpstream, Move: true, Cause: 1001}); search.Interruption != want {
						t.Errorf("got %+v, want %+v", search.Interruption, want)
					}
				})
			})
		}
	}
}

// The handshake comes first, then the acknowledgement and 100 ms of quiet, for at
// most two seconds, then Close 1001, and what the old one still says passes.
func TestTheOrderOfAMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := startMove(t, replay.Unacked)
		r.backend.behave(func(is *manners) { is.mute, is.silent = true, true })
		r.client.send(r.client.text("before"))
		r.then(dial{after: 3 * time.Second})
		began := time.Now()
		r.move()
		if got := r.rec.State(); got != registry.Migrating {
			t.Fatalf("got state %v, want migrating", got)
		}
		r.pass(time.Second)
		r.client.send(r.client.text("during the handshake"))
		synctest.Wait()
		if got, _ := r.backend.messages(); len(got) != 2 {
			t.Errorf("got %q at the old backend, want it served during the handshake", got)
		}
		r.pass(2100 * time.Millisecond)
		r.client.send(r.client.text("after it"))
		r.pass(5 * time.Second)
		frames := r.backend.received()
		last := frames[len(frames)-1]
		if got := last.at.Sub(began); last.head.OpCode != ws.OpClose || got != 5*time.Second {
			t.Errorf("got %v after %v as the last frame, want a close frame after 3s and 2s", last.head, got)
		}
		if got, _ := r.backend.messages(); len(got) != 2 {
			t.Errorf("got %q at the old backend, want nothing after the handshake", got)
		}
		r.backend.send(r.backend.text("still"), r.backend.closeFrame(1001, ""))
		r.backend.sendFIN()
		r.pass(time.Second)
		b := r.wantMoved()
		if got, _ := b.messages(); !slices.Equal(got, []string{"after it"}) {
			t.Errorf("got %q at the new backend, want what was kept", got)
		}
		r.wantPassed()
	})
}

func TestAMoveWithoutOutstandingMessagesWaitsForQuietAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := startMove(t, replay.Unacked)
		r.backend.send(r.backend.text("just said"))
		synctest.Wait()
		began := time.Now()
		r.move()
		r.pass(time.Second)
		r.wantMoved()
		frames := r.backend.received()
		if got := frames[len(frames)-1].at.Sub(began); got != quietPeriod {
			t.Errorf("got Close after %v, want 100ms", got)
		}
	})
}

func TestAMoveWithoutAnotherUpstreamStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: resuming(replay.Unacked)})
		if err := r.rec.Move(); !errors.Is(err, ErrNoUpstream) || !r.live() {
			t.Errorf("got %v, state %v, want no upstream and the session open", err, r.rec.State())
		}
		r2 := startIn(t, r.reg, setup{settings: resuming(replay.Unacked), others: []string{"b:80"}})
		for _, d := range []dial{{is: none}, {is: fails}, {is: refuses}} {
			r2.then(d)
			r2.move()
			r2.client.send(r2.client.text("stay"))
			r2.pass(time.Second)
			if !r2.live() || r2.rec.View().Upstream != firstUpstream {
				t.Errorf("got state %v (%s), want it to stay open where it is", r2.rec.State(), r2.rec.Ending().Reason)
			}
		}
		if got, _ := r2.backend.messages(); len(got) != 3 {
			t.Errorf("got %d messages, want 3", len(got))
		}
	})
}

func TestAPlannedMove(t *testing.T) {
	for name, plan := range map[string]func(r *rig){
		"MoveAt": func(r *rig) { r.rec.MoveAt(time.Now().Add(7 * time.Second)) },
		"leaves": func(r *rig) {
			r.mu.Lock()
			r.leaving[firstUpstream] = true
			r.mu.Unlock()
			r.Reconsider()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := startMove(t, replay.Unacked)
				began := time.Now()
				r.then(dial{is: fails}) // it is tried again
				plan(r)
				r.pass(30 * time.Second)
				r.wantMoved()
				at := r.asked()[0].at.Sub(began)
				if name == "MoveAt" && at != 7*time.Second || at > 10*time.Second {
					t.Errorf("got the move begun after %v, want 7s, or within drain_window", at)
				}
			})
		})
	}
}

func TestAMessageInProgressEndsBeforeTheMove(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := startMove(t, mode)
				r.client.send(r.client.frame(false, 0, ws.OpText, []byte("be")))
				synctest.Wait()
				r.move()
				r.pass(3 * time.Second)
				r.client.send(r.client.frame(true, 0, ws.OpContinuation, []byte("gun")))
				synctest.Wait()
				r.client.send(r.client.text("next"))
				r.pass(5 * time.Second)
				b := r.wantMoved()
				old, _ := r.backend.messages()
				next, _ := b.messages()
				if !slices.Equal(old, []string{"begun"}) || !slices.Equal(next, []string{"next"}) {
					t.Errorf("got %q and %q, want the message in progress at the old backend", old, next)
				}
				// One that does not end keeps the session where it is.
				r.client.send(r.client.frame(false, 0, ws.OpText, []byte("no")))
				r.pass(10 * time.Second)
				r.move()
				r.pass(20 * time.Second)
				if v := r.rec.View(); v.State != "open" || v.Upstream != "b:80" {
					t.Errorf("got %s at %s, want it open where it was", v.State, v.Upstream)
				}
				r.client.send(r.client.frame(true, 0, ws.OpContinuation, []byte(" end")))
				r.pass(time.Second)
				r.wantKept(promise{mode: mode, sent: []string{"begun", "next", "no end"}})
			})
		})
	}
}

// Each write of the client ends a message and begins the next one.
func TestAClientThatIsAlwaysInTheMiddleOfAMessageIsMoved(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := startMove(t, mode)
				messages := numbered(500, 50)
				next := func(m string) []byte { return r.client.frame(false, 0, ws.OpText, []byte(m[:5])) }
				rest := func(m string) []byte { return r.client.frame(true, 0, ws.OpContinuation, []byte(m[5:])) }
				r.client.send(next(messages[0]))
				for i, m := range messages[:499] {
					if i == 50 {
						r.move()
					}
					r.client.send(slices.Concat(rest(m), next(messages[i+1])))
					r.pass(20 * time.Millisecond)
				}
				r.client.send(rest(messages[499]))
				r.pass(20 * time.Second)
				r.wantMoved()
				r.wantKept(promise{mode: mode, sent: messages})
			})
		})
	}
}

func TestTheOldBackendDiesDuringAMove(t *testing.T) {
	for _, mode := range modes {
		for how, die := range deaths {
			for _, at := range []time.Duration{0, 500 * time.Millisecond, 1050 * time.Millisecond, 2 * time.Second, 4 * time.Second} {
				for _, resume := range []bool{true, false} {
					t.Run(fmt.Sprintf("%v, %s after %v, resume %v", mode, how, at, resume), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							r := startMove(t, mode)
							mode := mode
							if !resume {
								mode = replay.Off // nothing is kept where no client is held
								s := resuming(replay.Unacked)
								s.ResumeTimeout = 0
								r.change(s)
							}
							r.backend.behave(func(is *manners) { is.mute, is.silent = true, true })
							r.then(dial{after: time.Second})
							r.client.send(r.client.text("one"), r.client.text("two"))
							r.move()
							r.pass(at)
							die(r.backend)
							synctest.Wait()
							r.client.send(r.client.text("three"))
							r.pass(20 * time.Second)
							switch {
							case mode == replay.Strict && r.rec.Ending().Reason == registry.InDoubt:
								return
							case !resume && r.rec.Ending().Reason == registry.InDoubt:
								return // nothing was kept that could be repeated
							case !resume && r.rec.Ending().Reason == registry.BackendLost:
								if got := r.client.farewell(t); got != "1014 backend connection lost" {
									t.Errorf("got the client told %q, want 1014", got)
								}
								return
							}
							r.wantMoved()
							r.wantKept(promise{mode: mode, sent: []string{"one", "two", "three"}})
							b := r.latest()
							if got, _ := b.messages(); mode == replay.Unacked && (len(got) != 3 || b.told.Replayed != 2) {
								t.Errorf("got %q, %d of them announced as repeats, want all and two", got, b.told.Replayed)
							}
							for _, p := range r.discarded {
								if !p.conn.closed() {
									t.Error("got a discarded backend's connection open, want it closed")
								}
							}
						})
					})
				}
			}
		}
	}
}

func TestTheClientClosesDuringAMove(t *testing.T) {
	for _, at := range []time.Duration{500 * time.Millisecond, 1050 * time.Millisecond, 2 * time.Second, 4 * time.Second} {
		for _, mode := range modes {
			t.Run(fmt.Sprintf("%v, after %v", mode, at), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := startMove(t, mode)
					r.backend.behave(func(is *manners) { is.mute = true })
					r.then(dial{after: time.Second})
					r.client.send(r.client.text("one"))
					r.move()
					r.pass(at)
					r.client.send(r.client.text("two"))
					r.client.sendClose(1000, "bye")
					r.wantEndAnywhere(15*time.Second, registry.ClientClosed, "1000 bye")
					r.wantKept(promise{mode: mode, sent: []string{"one", "two"}})
					if got, _ := r.latest().messages(); len(r.used()) > 1 && len(got) > 1 {
						t.Errorf("got %q at the new backend, want no repeat", got)
					}
				})
			})
		}
	}
}

// wantEndAnywhere is wantEnd whatever backend is told.
func (r *rig) wantEndAnywhere(limit time.Duration, reason registry.Reason, client string) {
	r.t.Helper()
	r.wait(limit)
	if got := r.rec.Ending().Reason; got != reason {
		r.t.Errorf("got reason %q, want %q", got, reason)
	}
	if got := r.client.farewell(r.t); got != client {
		r.t.Errorf("got client told %q, want %q", got, client)
	}
}

// The answer of the backend that is being left is an answer to us, not to the client.
func TestTheClientClosesAsTheOldBackendAnswers(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := startMove(t, mode)
				r.backend.behave(func(is *manners) { is.silent = true })
				r.move()
				r.pass(500 * time.Millisecond) // it was told
				r.client.sendClose(1000, "bye")
				r.pass(time.Millisecond)
				r.backend.sendClose(1001, "")
				r.pass(time.Millisecond)
				if got := r.client.farewell(t); got != "1000" {
					t.Errorf("got client told %q, want its own code", got)
				}
				r.backend.exit()
				r.wantEnd(10*time.Second, registry.ClientClosed, "1000", "1001")
			})
		})
	}
}

// The end is decided without the lock, and the seeker may look just before that.
func TestNoBackendTakesOverFromOneThatLeavesDoubts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := startMove(t, replay.Strict)
		r.backend.stall()
		r.client.send(r.client.text("one"))
		synctest.Wait()
		r.move()
		r.client.send(r.client.text("two"))
		r.wait(20 * time.Second)
		r.wantTold(registry.InDoubt, "1012 delivery of a message is in doubt", "-")
		if left := r.session.backend(); left.settled || !left.doomed {
			t.Error("got accounts settled that leave doubts, want no backend to take over")
		}
		if got := len(r.used()); got != 1 {
			t.Errorf("got %d backends that had the session, want the first only", got)
		}
	})
}
