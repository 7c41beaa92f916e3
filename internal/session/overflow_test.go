// This file tests the limits of what is kept: replay_buffer, replay_memory, and
// messages that are larger.

package session

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

func TestPauseLosesNothing(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(mode)
				s.ReplayBuffer = 4000
				r := start(t, setup{settings: s, buffer: 2000, answers: true})
				r.lose()
				messages := numbered(100, 100)
				for _, m := range messages {
					r.client.send(r.client.text(m))
				}
				r.pass(5 * time.Second)
				if got := r.rec.View().Buffered; got > 4000 || mode != replay.Off && got < 3500 {
					t.Errorf("got %d bytes kept, want up to 4000", got)
				}
				if r.rec.State() != registry.Held {
					t.Fatalf("got state %v (%s), want held", r.rec.State(), r.rec.Ending().Reason)
				}
				r.resumed()
				r.pass(10 * time.Second)
				r.wantKept(promise{mode: mode, sent: messages})
				if got, _ := r.latest().messages(); len(got) != 100 {
					t.Errorf("got %d messages, want all", len(got))
				}
			})
		})
	}
}

func TestAClientThatIsPausedAndLeavesIsNoticedWithinASecond(t *testing.T) {
	for name, leave := range map[string]func(p *peer){"reset": (*peer).crash, "FIN": (*peer).sendFIN} {
		for _, mode := range modes {
			t.Run(name+", "+mode.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := resuming(mode)
					s.ReplayBuffer = 300
					r := start(t, setup{settings: s, answers: true})
					r.always(dial{is: fails})
					r.backend.crash()
					for _, m := range numbered(3, 100) {
						r.client.send(r.client.text(m))
					}
					r.pass(5 * time.Second)
					left := time.Now()
					leave(r.client)
					if name == "FIN" {
						// What it has sent before is waited for.
						r.wait(time.Minute)
						return
					}
					r.wait(time.Minute)
					if took := r.endedAt.Sub(left); took > activePeriod || r.rec.Ending().Reason != registry.ClientGone {
						t.Errorf("got the end (%s) after %v, want client_gone within a second", r.rec.Ending().Reason, took)
					}
				})
			})
		}
	}
}

func TestOverflowEndsAClientOnlyWhileItIsHeld(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(mode)
				s.ReplayBuffer, s.ReplayClose = 4000, true
				r := start(t, setup{settings: s, backend: manners{mute: true}, answers: true})
				for _, m := range numbered(100, 100) {
					r.client.send(r.client.text(m))
				}
				r.pass(5 * time.Second)
				if !r.live() {
					t.Fatalf("got the end (%s) while the backend is there, want the client paused", r.rec.Ending().Reason)
				}
				if mode == replay.Strict {
					return // it is in doubt
				}
				r.always(dial{is: fails})
				r.backend.crash()
				for _, m := range numbered(100, 120) {
					r.client.send(r.client.text(m))
				}
				if mode == replay.Off {
					r.wantEnd(time.Minute, registry.ResumeTimeout, "1013 no backend available", "-")
					return
				}
				r.wantEnd(time.Second, registry.Overflow, "1013 too many messages while no backend is available", "-")
			})
		})
	}
}

func TestSessionsShareTheReplayMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := registry.New()
		reg.ReplayMemory.SetLimit(20_000)
		var rigs [2]*rig
		for i := range rigs {
			rigs[i] = startIn(t, reg, setup{settings: resuming(replay.Unacked), buffer: 2000, answers: true})
			rigs[i].pass(10 * time.Second)
		}
		messages := numbered(100, 400)
		for i, r := range rigs {
			r.then(dial{after: time.Duration(10+10*i) * time.Second})
			r.backend.crash()
			for _, m := range messages {
				r.client.send(r.client.text(m))
			}
			r.pass(time.Second)
		}
		if got := reg.ReplayMemory.Used(); got > 20_000 {
			t.Errorf("got %d bytes in use, want at most 20000", got)
		}
		a, b := rigs[0].rec.View().Buffered, rigs[1].rec.View().Buffered
		if a < 10_000 || b > a {
			t.Errorf("got %d and %d bytes kept, want the first to have most", a, b)
		}
		rigs[0].resumed()
		rigs[0].pass(3 * time.Second)
		if got := rigs[1].rec.View().Buffered; got < 10_000 {
			t.Errorf("got %d bytes kept by the second, want it to go on with what the first gave back", got)
		}
		for _, r := range rigs {
			r.resumed()
			r.pass(10 * time.Second)
			r.wantKept(promise{mode: replay.Unacked, sent: messages})
			if got, _ := r.latest().messages(); len(got) != len(messages) {
				t.Errorf("got %d messages, want all", len(got))
			}
		}
	})
}

func TestAMessageLargerThanTheBufferIsStreamed(t *testing.T) {
	for _, mode := range modes {
		for _, frames := range []int{1, 5} {
			t.Run(fmt.Sprintf("%v, %d frames", mode, frames), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := resuming(mode)
					s.ReplayBuffer = 5000
					r := start(t, setup{settings: s, answers: true})
					r.pass(10 * time.Second)
					var messages []string
					for i := range 5 {
						messages = append(messages, numbered(i+1, 50_000)[i])
						part := len(messages[i]) / frames
						for f := range frames {
							op, p := ws.OpContinuation, messages[i][f*part:]
							if f == 0 {
								op = ws.OpText
							}
							if f < frames-1 {
								p = p[:part]
							}
							r.client.send(r.client.frame(f == frames-1, 0, op, []byte(p)))
							r.pass(100 * time.Millisecond)
						}
						messages = append(messages[:i], messages[i])
					}
					r.pass(10 * time.Second)
					r.wantKept(promise{mode: mode, sent: messages})
					if got := r.rec.View().Buffered; got != 0 {
						t.Errorf("got %d bytes kept, want none", got)
					}
					r.client.send(r.client.frame(false, 0, ws.OpText, make([]byte, 20_000)))
					r.pass(100 * time.Millisecond)
					r.backend.crash()
					if mode != replay.Off {
						r.wantEnd(time.Minute, registry.Torn, "1012 a message was cut off", "-")
						return
					}
					r.resumed()
					r.client.send(r.client.frame(true, 0, ws.OpContinuation, nil), r.client.text("next"))
					r.pass(time.Second)
					if got, _ := r.latest().messages(); len(got) != 1 || got[0] != "next" {
						t.Errorf("got %d messages, want the next one alone", len(got))
					}
				})
			})
		}
	}
}

// The client is read whenever the backend has acknowledged a part of a full buffer: the
// clock looks all the same.
func TestALifetimeEndsWhileTheBufferIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := resuming(replay.Unacked)
		s.ReplayBuffer, s.MaxLifetime = 2000, 10*time.Second
		r := start(t, setup{settings: s, answers: true, backend: manners{chunk: 1000, every: 100 * time.Millisecond}})
		for _, m := range numbered(2000, 100) {
			r.client.send(r.client.text(m))
		}
		r.pass(5 * time.Second)
		if got, _ := r.backend.messages(); len(got) < 100 || len(got) > 1000 {
			t.Errorf("got %d messages in 5s, want a backend that is slow, and a full buffer", len(got))
		}
		r.wait(time.Minute)
		if got := r.endedAt.Sub(r.began); got > 10*time.Second+activePeriod || r.rec.Ending().Reason != registry.Lifetime {
			t.Errorf("got the end (%s) after %v, want the lifetime's after 10s", r.rec.Ending().Reason, got)
		}
	})
}
