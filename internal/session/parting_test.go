// This file tests backends that close in good order: what proves that they have
// read everything, and what does not.

package session

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

func TestWhatAClosingBackendProves(t *testing.T) {
	for _, test := range []struct {
		name   string
		parts  func(r *rig)
		proven bool
		after  time.Duration // until it is lost
	}{
		{"close, echo, FIN", func(r *rig) { r.backend.sendClose(1012, "") }, true, 0},
		{"FIN before the echo", func(r *rig) {
			r.backend.mu.Lock()
			wire := r.backend.closeFrame(1012, "")
			r.backend.mu.Unlock()
			// Both lie in the buffer before the session looks.
			_, _ = r.backend.conn.Write(wire)
			_ = r.backend.conn.CloseWrite()
		}, false, 0},
		{"close, then a reset", func(r *rig) {
			r.backend.stall()
			r.backend.sendClose(1012, "")
			synctest.Wait()
			r.backend.crash()
		}, false, 0},
		{"close, then an exit with the echo unread", func(r *rig) {
			r.backend.stall()
			r.backend.sendClose(1012, "")
			synctest.Wait()
			r.backend.exit()
		}, false, 0},
		{"close, and never the end", func(r *rig) {
			r.backend.stall()
			r.backend.sendClose(1012, "")
		}, false, 5 * time.Second},
		{"close, the echo read, and never the end", func(r *rig) {
			r.backend.behave(func(is *manners) { is.silent = true })
			r.backend.sendClose(1012, "")
		}, false, 5 * time.Second},
		{"FIN alone", func(r *rig) { r.backend.sendFIN() }, false, 0},
		{"reset", func(r *rig) { r.backend.crash() }, false, 0},
	} {
		for _, mode := range modes {
			for name, blindfold := range map[string]bool{"TCP": false, "nothing known of the socket": true} {
				t.Run(test.name+", "+mode.String()+", "+name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						r := start(t, setup{settings: resuming(mode), backend: manners{mute: true}, answers: true, others: []string{"b:80"}, blind: blindfold})
						r.pass(10 * time.Second)
						r.client.send(r.client.text("one"), r.client.text("two"))
						r.client.send(r.client.frame(false, 0, ws.OpText, []byte("thr")))
						synctest.Wait()
						began := time.Now()
						test.parts(r)
						synctest.Wait()
						r.client.send(r.client.frame(true, 0, ws.OpContinuation, []byte("ee")))
						proven := test.proven && !blindfold
						if mode == replay.Strict && !proven {
							r.wantEnd(10*time.Second, registry.InDoubt, "1012 delivery of a message is in doubt", r.backend.farewell(t))
							return
						}
						b := r.resumed()
						r.pass(time.Second)
						search := r.asked()[0]
						if took := search.at.Sub(began); took < test.after || took > test.after+closingPeriod {
							t.Errorf("got it lost after %v, want %v", took, test.after)
						}
						want := []string{"three"}
						switch {
						case mode == replay.Unacked && !proven:
							want = []string{"one", "two", "three"}
						case mode == replay.Off:
							want = nil
						}
						if got, _ := b.messages(); !slices.Equal(got, want) {
							t.Errorf("got %q at the next backend, want %q", got, want)
						}
						if want := max(0, len(want)-1); search.Replayed != want || r.rec.View().Replayed != want {
							t.Errorf("got %d repeats announced and %d on record, want %d", search.Replayed, r.rec.View().Replayed, want)
						}
					})
				})
			}
		}
	}
}

// After the echo nothing more goes to a backend that closes, and nothing is torn.
func TestMessagesThatComeWhileABackendClosesGoToTheNext(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(mode), answers: true, others: []string{"b:80"}})
				r.pass(time.Minute)
				r.client.sendInPieces(slices.Concat(r.client.text("one"), r.client.text("two"), r.client.text("three")), 5, 50*time.Millisecond)
				r.pass(70 * time.Millisecond)
				r.backend.behave(func(is *manners) { is.silent = true })
				r.backend.sendClose(1012, "")
				r.pass(time.Second)
				if got := r.rec.State(); got != registry.Held {
					t.Fatalf("got state %v while the backend closes, want held", got)
				}
				r.backend.exit()
				r.resumed()
				r.pass(5 * time.Second)
				r.wantKept(promise{mode: mode, sent: []string{"one", "two", "three"}})
				r.backend.farewell(t) // nothing after it
				if got, _ := r.latest().messages(); len(got) == 0 {
					t.Error("got no message at the next backend, want what came meanwhile")
				}
			})
		})
	}
}

// A backend that goes away in the middle of a move has said why, and has its time from then on.
func TestABackendThatPartsDuringAMoveIsNotLeftOnceMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := startMove(t, replay.Unacked)
		r.then(dial{after: 2 * time.Second})
		r.move()
		r.backend.behave(func(is *manners) { is.silent = true }) // its connection stays
		r.backend.sendClose(1012, "")
		parted := time.Now()
		for r.latest() == r.backend || !r.live() {
			r.pass(10 * time.Millisecond)
		}
		if took := time.Since(parted); took > partingTimeout+closingPeriod+time.Second {
			t.Errorf("got the next backend after %v, want it soon after %v", took, partingTimeout)
		}
		if got := r.wantMoved().told.Cause; got != 1012 {
			t.Errorf("got cause %d, want the backend's own", got)
		}
	})
}
