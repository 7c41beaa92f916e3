// This file lets backends die at every byte of what they get and of what they
// send: nothing is torn, merged, split, or left out against the promise.

package session

import (
	"bytes"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

// script is a sequence of frames with all that may stand between two of them,
// the messages in it and the pings.
func script(p *peer, name string) (frames [][]byte, messages, pings []string) {
	ping := func(payload string) []byte {
		pings = append(pings, name+payload)
		return p.frame(true, 0, ws.OpPing, []byte(name+payload))
	}
	frames = [][]byte{
		p.text(name + "one"),
		ping("P"),
		p.frame(false, 0, ws.OpText, []byte(name+"tw")),
		ping("Q"),
		p.frame(false, 0, ws.OpContinuation, nil),
		p.frame(true, 0, ws.OpPong, []byte("unasked")),
		p.frame(true, 0, ws.OpContinuation, []byte("o")),
		p.frame(true, 0, ws.OpBinary, []byte(name+"three")),
		p.frame(false, 0, ws.OpBinary, []byte(name+"fo")),
		p.frame(true, 0, ws.OpContinuation, []byte("ur")),
		ping("R"),
	}
	messages = []string{name + "one", name + "two", name + "three", name + "four"}
	return frames, messages, pings
}

func TestABackendThatDiesAtAnyByteOfWhatItGetsTearsNothing(t *testing.T) {
	// Its length on the wire, with the session's own pings.
	const most = 150
	for _, mode := range modes {
		for how, die := range deaths {
			for _, buffer := range []int{5, defaultBuffer} {
				t.Run(fmt.Sprintf("%v, %s, buffer %d", mode, how, buffer), func(t *testing.T) {
					for at := 1; at < most; at++ {
						synctest.Test(t, func(t *testing.T) {
							r := start(t, setup{
								settings: resuming(mode), buffer: buffer, answers: true,
								backend: manners{dies: die, after: at},
							})
							r.pass(time.Minute) // older than any backoff
							// The second one dies as well, elsewhere.
							r.then(dial{manners: manners{dies: die, after: 1 + at*7%most}})
							frames, messages, pings := script(r.client, "c")
							for _, f := range frames {
								r.client.send(f)
							}
							r.pass(10 * time.Second)
							late := []string{"late", "later"}
							for _, m := range late {
								r.client.send(r.client.text(m))
							}
							r.pass(10 * time.Second)
							r.wantAfterDeaths(mode, append(messages, late...), pings)
							if t.Failed() {
								t.Fatalf("the first backend died after %d bytes", at)
							}
						})
					}
				})
			}
		}
	}
}

// wantAfterDeaths checks all that holds after backends have died.
func (r *rig) wantAfterDeaths(mode replay.Mode, messages, pings []string) {
	r.t.Helper()
	r.wantKept(promise{mode: mode, sent: messages})
	r.wantPassed()
	r.wantPonged(pings)
	switch end := r.rec.Ending().Reason; {
	case end == registry.InDoubt && mode == replay.Strict:
		if got := r.client.farewell(r.t); got != "1012 delivery of a message is in doubt" {
			r.t.Errorf("got client told %q, want 1012", got)
		}
	case end != "":
		r.t.Errorf("got the end (%s), want the session to live", end)
	case !r.live():
		r.t.Errorf("got state %v, want open", r.rec.State())
	}
}

func TestABackendThatDiesAtAnyByteOfWhatItSendsTearsNothing(t *testing.T) {
	for how, die := range deaths {
		for _, mode := range modes {
			t.Run(fmt.Sprintf("%s, %v", how, mode), func(t *testing.T) {
				for at := range 80 {
					synctest.Test(t, func(t *testing.T) {
						r := start(t, setup{settings: resuming(mode), answers: true})
						r.pass(time.Minute)
						frames, _, _ := script(r.backend, "b")
						wire := bytes.Join(frames, nil)
						if at > len(wire) {
							return
						}
						r.then(dial{after: time.Second, early: func(p *peer) []byte {
							frames, _, _ := script(p, "n")
							return p.sendEarly(frames[:3], frames[3:])
						}})
						r.backend.send(wire[:at])
						synctest.Wait()
						die(r.backend)
						synctest.Wait()
						_, torn := wholeMessages(r.client.wire())
						whole, _ := r.client.messages()
						complete, _ := wholeMessages(wire[:at])
						if len(whole) != len(complete) {
							t.Errorf("got %d messages at the client, want the %d that were sent", len(whole), len(complete))
						}
						begun := torn != ""
						r.pass(10 * time.Second)
						r.wantPassed()
						if begun {
							r.wantEnd(time.Second, registry.Torn, "1012 a message was cut off", "-")
						} else if !r.live() || len(r.used()) != 2 {
							t.Errorf("got state %v (reason %q), want it taken over", r.rec.State(), r.rec.Ending().Reason)
						}
						if t.Failed() {
							t.Fatalf("the first backend died after %d bytes", at)
						}
					})
				}
			})
		}
	}
}

// The next backend may be there before the client has read what the lost one sent.
func TestNothingFollowsAMessageToTheClientThatIsTorn(t *testing.T) {
	for name, next := range map[string]dial{
		"next backend that speaks first": {early: func(p *peer) []byte { return p.sendEarly([][]byte{p.text("hello")}, nil) }},
		"next backend that is silent":    {},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := resuming(replay.Unacked)
				s.PingInterval, s.WriteTimeout = 0, 0
				r := start(t, setup{settings: s, buffer: 1000})
				r.pass(time.Minute)
				r.client.stall()
				r.backend.send(r.backend.frame(false, 0, ws.OpText, make([]byte, 20_000)))
				synctest.Wait()
				r.then(next)
				r.backend.crash()
				r.pass(20 * time.Second)
				r.client.resume()
				r.wantEnd(time.Minute, registry.Torn, "1012 a message was cut off", "-")
				wantLegal(t, "to the client", r.client)
				r.wantPassed()
			})
		})
	}
}

// Under off a message that was begun on a lost backend is given up. Its rest goes
// nowhere, also while the session ends.
func TestTheRestOfAMessageThatIsGivenUpGoesNowhere(t *testing.T) {
	for name, end := range map[string]func(r *rig){
		"open": func(*rig) {},
		"closing": func(r *rig) {
			// The close frame does not fit the client's buffer any more.
			r.client.stall()
			r.latest().send(r.latest().binary(1000 - 4 - 2))
			synctest.Wait()
			r.latest().sendClose(1000, "")
			synctest.Wait()
			if r.rec.State() != registry.Closing {
				r.t.Fatalf("got state %v, want closing", r.rec.State())
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(replay.Off), buffer: 1000})
				r.client.send(r.client.frame(false, 0, ws.OpText, []byte("begun ")))
				synctest.Wait()
				r.backend.crash()
				b := r.resumed()
				end(r)
				r.client.send(r.client.frame(true, 0, ws.OpContinuation, []byte("and ended")))
				r.client.send(r.client.text("another"))
				r.pass(time.Second)
				wantLegal(t, "to the next backend", b)
				if got, _ := b.messages(); len(got) > 0 && got[0] != "another" || r.live() && len(got) != 1 {
					t.Errorf("got %q, want another alone", got)
				}
			})
		})
	}
}
