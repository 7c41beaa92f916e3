// This file tests what the next backend gets, in each mode of replay.

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

// lose breaks the backend's connection and lets the client be held for a minute.
func (r *rig) lose() {
	r.t.Helper()
	r.then(dial{after: 20 * time.Second})
	r.latest().crash()
	synctest.Wait()
	if got := r.rec.State(); got != registry.Held {
		r.t.Fatalf("got state %v (reason %q) after the backend was lost, want held", got, r.rec.Ending().Reason)
	}
}

// resumed waits until another backend has taken over.
func (r *rig) resumed() *peer {
	r.t.Helper()
	for range 60 {
		if r.live() && r.latest() != r.backend {
			return r.latest()
		}
		r.pass(time.Second)
	}
	r.t.Fatalf("got state %v (reason %q) after a minute, want another backend", r.rec.State(), r.rec.Ending().Reason)
	return nil
}

func numbered(n, size int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("message %d %s", i, strings.Repeat("x", size)))
	}
	return all
}

// The queue keeps bytes in pieces that do not end where frames do.
func TestNoPingLandsInsideAFrameThatIsReplayed(t *testing.T) {
	for _, mode := range []replay.Mode{replay.Unacked, replay.Unsent, replay.Strict} {
		for _, size := range []int{400, 3000, 15_000} {
			t.Run(fmt.Sprintf("%v, %d", mode, size), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := start(t, setup{settings: resuming(mode), answers: true})
					r.lose()
					messages := append([]string{"small"}, numbered(20, size)...)
					for _, m := range messages {
						r.client.send(r.client.text(m))
					}
					b := r.resumed()
					r.pass(5 * time.Second)
					wantLegal(t, "to the backend", b)
					r.wantKept(promise{mode: mode, sent: messages})
				})
			})
		}
	}
}

// Other work that comes while messages are replayed waits for the end of a frame.
func TestNothingLandsInsideAFrameThatIsReplayedToASlowBackend(t *testing.T) {
	for name, work := range map[string]func(r *rig){
		"a close frame": func(r *rig) { r.rec.Close(registry.Ending{Reason: registry.Admin}) },
		"a heartbeat":   func(*rig) { time.Sleep(35 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(replay.Unacked)
				s.WriteTimeout = 0
				r := start(t, setup{settings: s, buffer: 64, answers: true})
				r.then(dial{after: 20 * time.Second, manners: manners{stalled: true}})
				r.backend.crash()
				messages := append([]string{"small"}, numbered(20, 3000)...)
				for _, m := range messages {
					r.client.send(r.client.text(m))
				}
				b := r.resumed()
				work(r)
				b.behave(func(is *manners) { is.stalled, is.chunk, is.every = false, 100, time.Millisecond })
				r.pass(time.Minute)
				wantLegal(t, "to the backend", b)
				if b.farewell(t); b.parsed < len(b.raw) {
					t.Errorf("got %d bytes of a frame that does not end, want whole frames", len(b.raw)-b.parsed)
				}
				r.wantKept(promise{mode: replay.Unacked, sent: messages})
			})
		})
	}
}

// A message that is larger than replay_buffer is written once or never; who
// loses a part of it is told.
func TestAStreamedMessageThatWasNotCompletelyWrittenIsTorn(t *testing.T) {
	for _, mode := range []replay.Mode{replay.Unacked, replay.Unsent, replay.Strict} {
		for _, size := range []int{1200, 40_000} {
			t.Run(fmt.Sprintf("%v, %d", mode, size), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := resuming(mode)
					s.ReplayBuffer = 1000
					r := start(t, setup{settings: s, buffer: 100, answers: true})
					r.pass(time.Minute)
					// It dies when all but the last bytes were written.
					r.backend.behave(func(is *manners) { is.dies, is.after = (*peer).crash, size-300 })
					r.client.send(r.client.text("before"))
					synctest.Wait()
					r.client.send(r.client.binary(size))
					r.pass(time.Minute)
					if end := r.rec.Ending().Reason; end != registry.Torn {
						got, _ := r.latest().messages()
						t.Errorf("got the end %q, state %v, and %d messages at the next backend, want it torn", end, r.rec.State(), len(got))
					}
				})
			})
		}
	}
}

// More pings than the session keeps in mind are answered by it; the backend's
// late answers are not passed on as well.
func TestPingsThatTheSessionAnswersAreNotAnsweredTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: resuming(replay.Unacked), backend: manners{stalled: true}})
		var pings []string
		for i := range 100 {
			pings = append(pings, fmt.Sprint("ping ", i))
			r.client.send(r.client.frame(true, 0, ws.OpPing, []byte(pings[i])))
			synctest.Wait()
		}
		r.backend.resume()
		r.pass(time.Second)
		r.wantPonged(pings)
	})
}
