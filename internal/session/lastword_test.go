// This file tests clients that send something and leave at once, while the backend
// that was to read it is lost.

package session

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// The backend's kernel has the messages and the client's last word behind them, and
// the backend dies before it has read anything.
func TestABackendDiesWithTheClientsLastWords(t *testing.T) {
	closing := func(r *rig) { r.client.sendClose(1000, "bye") }
	leaving := func(r *rig) { r.client.sendFIN() }
	for _, test := range []struct {
		name       string
		mode       replay.Mode
		end        func(r *rig)
		reason     registry.Reason
		client, to string // what the client and the next backend are told; "": there is none
	}{
		{"close", replay.Unacked, closing, registry.ClientClosed, "1000 bye", "1000 bye"},
		{"close", replay.Strict, closing, registry.InDoubt, "1012 delivery of a message is in doubt", ""},
		{"close", replay.Unsent, closing, registry.ClientClosed, "1000", ""},
		{"FIN", replay.Unacked, leaving, registry.ClientGone, "-", "1001"},
	} {
		for death, die := range map[string]func(p *peer){"resets": (*peer).crash, "hangs": func(*peer) {}} {
			t.Run(test.name+", "+test.mode.String()+", "+death, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := start(t, setup{settings: resuming(test.mode), backend: manners{stalled: true}, answers: true})
					r.always(dial{})
					r.pass(time.Second)
					messages := numbered(3, 10)
					for _, m := range messages {
						r.client.send(r.client.text(m))
					}
					test.end(r)
					r.pass(100 * time.Millisecond)
					die(r.backend)
					r.wait(2 * time.Minute)
					if got := r.rec.Ending().Reason; got != test.reason {
						t.Errorf("got reason %q, want %q", got, test.reason)
					}
					if got := r.client.farewell(t); got != test.client {
						t.Errorf("got client told %q, want %q", got, test.client)
					}
					if test.to == "" {
						if got := len(r.used()); got != 1 {
							t.Errorf("got %d backends, want no other", got)
						}
						return
					}
					if got := len(r.used()); got != 2 {
						t.Fatalf("got %d backends, want another one", got)
					}
					if got, _ := r.latest().messages(); !slices.Equal(got, messages) {
						t.Errorf("got %q delivered, want all that was sent", got)
					}
					if got := r.latest().farewell(t); got != test.to {
						t.Errorf("got the next backend told %q, want %q", got, test.to)
					}
				})
			})
		}
	}
}

// A backend that reads shows it at once, whenever it was asked last: the end waits for
// one round trip, and for a busy application as long as that. A client that closes its
// connection behind its close frame is waited for.
func TestTheLastWordFollowsWhatWasRead(t *testing.T) {
	for _, test := range []struct {
		name    string
		with    setup
		leaves  bool          // the client, behind its close frame
		busy    time.Duration // the application
		flood   int           // what the backend sends meanwhile
		at, by  time.Duration // when the backend is told
		backend string
	}{
		{name: "reads", with: setup{answers: true}, by: 100 * time.Millisecond, backend: "1000 bye"},
		{name: "reads, and was never asked before", by: 100 * time.Millisecond, backend: "1000 bye"},
		{name: "is busy", with: setup{answers: true, backend: manners{stalled: true}}, busy: 5 * time.Second, at: 5 * time.Second, by: 6 * time.Second, backend: "1000 bye"},
		{name: "is busy, and the client leaves", with: setup{answers: true, backend: manners{stalled: true}}, leaves: true, busy: 5 * time.Second, at: 5 * time.Second, by: 6 * time.Second, backend: "1000 bye"},
		{name: "reads, and the client does not", with: setup{answers: true, backend: manners{mute: true}, client: manners{stalled: true}}, flood: 1 << 20, by: 2 * time.Second, backend: "1000 bye"},
		{name: "answers no pings", with: setup{backend: manners{mute: true}}, by: 400 * time.Millisecond, backend: "1000 bye"},
	} {
		for _, mode := range []replay.Mode{replay.Unacked, replay.Strict} {
			t.Run(test.name+", "+mode.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					test.with.settings = resuming(mode)
					r := start(t, test.with)
					r.client.send(r.client.text("one"))
					r.pass(10 * time.Millisecond) // a ping has followed it
					r.client.send(r.client.text("two"))
					r.pass(time.Millisecond)
					if test.flood > 0 {
						r.backend.send(r.backend.binary(test.flood))
						r.pass(2 * time.Second)
					}
					r.client.sendClose(1000, "bye")
					began := time.Now()
					if test.leaves {
						r.client.sendFIN()
					}
					r.pass(test.busy)
					r.backend.behave(func(is *manners) { is.stalled = false })
					r.wait(10 * time.Second)
					if got, want := r.rec.Ending().Reason, registry.ClientClosed; got != want {
						t.Errorf("got reason %q, want %q", got, want)
					}
					if got := r.backend.farewell(t); got != test.backend {
						t.Errorf("got the backend told %q, want %q", got, test.backend)
					}
					if got := len(r.used()); got != 1 {
						t.Errorf("got %d backends, want no other", got)
					}
					frames := r.backend.received()
					if took := frames[len(frames)-1].at.Sub(began); took < test.at || took > test.by {
						t.Errorf("got the backend told after %v, want %v to %v", took, test.at, test.by)
					}
					r.wantKept(promise{mode: mode, sent: []string{"one", "two"}})
				})
			})
		}
	}
}

// A backend that has said that it goes is asked nothing more; what it leaves unread is
// known when it is gone.
func TestTheLastWordToABackendThatGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: resuming(replay.Unacked), backend: manners{stalled: true}, answers: true})
		r.always(dial{})
		messages := numbered(3, 10)
		for _, m := range messages {
			r.client.send(r.client.text(m))
			r.pass(10 * time.Millisecond) // a ping has followed the first one only
		}
		r.backend.sendClose(1012, "")
		r.pass(10 * time.Millisecond)
		r.client.sendClose(1000, "bye")
		r.wait(10 * time.Second)
		if got := r.client.farewell(t); got != "1000 bye" {
			t.Errorf("got client told %q, want its own words", got)
		}
		if got, _ := r.latest().messages(); len(r.used()) != 2 || !slices.Equal(got, messages) {
			t.Errorf("got %q delivered to %d backends, want all that was sent at the second one", got, len(r.used()))
		}
	})
}
