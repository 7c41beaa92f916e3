// This file tests backends that close in good order: what proves that they have
// read everything, and what does not.

package session

import (
	"crypto/tls"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
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
			out := r.backend.conn.out
			out.update(func() { // both at once: the session finds the FIN behind the frame
				out.put(wire)
				out.fin = true
			})
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
			for name, with := range map[string]setup{"TCP": {}, "TCP, its end read late": {lateEnd: true}, "nothing known of the socket": {blind: true}} {
				t.Run(test.name+", "+mode.String()+", "+name, func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						with.settings, with.backend, with.answers, with.others = resuming(mode), manners{mute: true}, true, []string{"b:80"}
						r := start(t, with)
						r.pass(10 * time.Second)
						r.client.send(r.client.text("one"), r.client.text("two"))
						r.client.send(r.client.frame(false, 0, ws.OpText, []byte("thr")))
						synctest.Wait()
						began := time.Now()
						test.parts(r)
						r.pass(2 * time.Millisecond)
						r.client.send(r.client.frame(true, 0, ws.OpContinuation, []byte("ee")))
						proven := test.proven && !with.blind
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

// Over TLS a backend ends its stream by a close_notify, and its connection after that: only
// then does a reset tell that it has left something unread.
func TestWhatAClosingBackendProvesOverTLS(t *testing.T) {
	cert := testca.New(t).Issue(t, "backend", "localhost")
	readsAll := func(far *tls.Conn) { _, _ = io.Copy(io.Discard, far) } // ends with our close_notify
	for _, test := range []struct {
		name   string
		parts  func(r *rig, far *tls.Conn)
		proven bool
	}{
		{"close_notify and, before it looks for an answer, FIN", func(r *rig, far *tls.Conn) {
			go readsAll(far)
			synctest.Wait()
			_ = far.SetReadDeadline(past)
			_ = far.CloseWrite()
			r.pass(closingPeriod / 2)
			r.backend.exit()
		}, true},
		{"close_notify, and FIN once it is answered", func(_ *rig, far *tls.Conn) {
			go func() {
				readsAll(far)
				_ = far.Close()
			}()
			synctest.Wait()
			_ = far.CloseWrite()
		}, true},
		{"close_notify, and a second later an exit with messages unread", func(r *rig, far *tls.Conn) {
			_ = far.CloseWrite()
			r.pass(time.Second)
			r.backend.exit()
		}, false},
		{"close_notify, and never the end", func(_ *rig, far *tls.Conn) { _ = far.CloseWrite() }, false},
	} {
		for _, mode := range []replay.Mode{replay.Unacked, replay.Strict} {
			t.Run(test.name+", "+mode.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := start(t, setup{settings: resuming(mode), secure: true, backend: manners{stalled: true}, others: []string{"b:80"}})
					far := tls.Server(netConn{r.backend.conn}, &tls.Config{Certificates: []tls.Certificate{cert}})
					if err := far.Handshake(); err != nil {
						t.Fatal(err)
					}
					r.client.send(r.client.text("one"), r.client.text("two"))
					synctest.Wait()
					if _, err := far.Write(r.backend.closeFrame(1012, "")); err != nil {
						t.Fatal(err)
					}
					synctest.Wait() // our close frame is behind the messages
					test.parts(r, far)
					if mode == replay.Strict && !test.proven {
						r.wait(10 * time.Second)
						if got := r.rec.Ending().Reason; got != registry.InDoubt {
							t.Errorf("got reason %q, want in doubt", got)
						}
						return
					}
					began := time.Now()
					b := r.resumed()
					if took := time.Since(began); test.proven && took > 2*time.Second {
						t.Errorf("got the next backend after %v, want it soon", took)
					}
					r.pass(time.Second)
					want := []string{"one", "two"}
					if test.proven {
						want = nil
					}
					if got, _ := b.messages(); !slices.Equal(got, want) {
						t.Errorf("got %q at the next backend, want %q", got, want)
					}
				})
			})
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
