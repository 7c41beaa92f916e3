// This file tests the time without a backend: what the client sees, what ends it,
// and what becomes of what it sent.

package session

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/replay"
)

func TestPingsAreAnsweredOnceAcrossALoss(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(mode), backend: manners{mute: true}})
				var pings []string
				ping := func(payload string) {
					pings = append(pings, payload)
					r.client.send(r.client.frame(true, 0, ws.OpPing, []byte(payload)))
					r.pass(time.Millisecond)
				}
				ping("forwarded, not answered")
				ping("")
				r.lose()
				ping("held")
				ping("held, later")
				if v := r.rec.View(); v.State != "held" || v.Upstream != "" || r.places(firstUpstream) != 0 {
					t.Errorf("got the record %+v, want it held without an upstream", v)
				}
				wantPonged(t, r.client, pings, true)
				r.resumed()
				ping("to the next")
				wantPonged(t, r.client, pings, true)
			})
		})
	}
}

func TestMessagesKeptWhileHeldComeInOrderAlsoIfTheBackendSpeaksFirst(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: resuming(mode), others: []string{"b:80"}})
				r.then(dial{after: 20 * time.Second, early: func(p *peer) []byte {
					return p.sendEarly([][]byte{p.text("hello")}, [][]byte{p.text("again")})
				}})
				r.backend.crash()
				synctest.Wait() // under off, what is written until it is noticed is lost
				messages := numbered(50, 100)
				for _, m := range messages {
					r.client.send(r.client.text(m))
				}
				r.pass(time.Second)
				if got := r.rec.View().Buffered; (got == 0) != (mode == replay.Off) {
					t.Errorf("got %d bytes kept, want them kept but under off", got)
				}
				r.resumed()
				r.client.send(r.client.text("last"))
				r.pass(10 * time.Second)
				r.wantKept(promise{mode: mode, sent: append(messages, "last")})
				r.wantPassed()
				if got, _ := r.latest().messages(); len(got) != 51 {
					t.Errorf("got %d messages, want all 51", len(got))
				}
			})
		})
	}
}

func TestAHeldClientIsEnded(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(s *Settings)
		cause  func(r *rig)
		after  time.Duration
		reason registry.Reason
		client string
	}{
		{"after resume_timeout", nil, nil, 30 * time.Second, registry.ResumeTimeout, "1013 no backend available"},
		{"at the end of its life", func(s *Settings) { s.MaxLifetime = 70 * time.Second }, nil, 10 * time.Second, registry.Lifetime, "1001 end of lifetime"},
		{"idle", func(s *Settings) { s.IdleTimeout = 80 * time.Second }, nil, 20 * time.Second, registry.Idle, "1001 idle"},
		{"when it answers no ping", nil, func(r *rig) {
			r.change(func() Settings { s := *r.Settings(); s.ResumeTimeout = time.Hour; return s }())
			r.client.behave(func(is *manners) { is.mute = true })
		}, 61 * time.Second, registry.PingTimeout, "1001 ping timeout"},
		{"at a shutdown", nil, func(r *rig) {
			go r.reg.Shutdown(context.Background())
		}, 0, registry.Shutdown, "1012 server shutting down"},
		{"when resuming is turned off", nil, func(r *rig) {
			s := *r.Settings()
			s.ResumeTimeout = 0
			r.change(s)
		}, 0, registry.ResumeTimeout, "1013 no backend available"},
		{"by an admin", nil, func(r *rig) { r.rec.Close(registry.Ending{Reason: registry.Admin}) }, 0, registry.Admin, "1001"},
	} {
		for name, d := range map[string]dial{"dials fail": {is: fails}, "dials hang": {is: fails, after: time.Hour}} {
			t.Run(test.name+", "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := resuming(replay.Unacked)
					if test.change != nil {
						test.change(&s)
					}
					r := prepare(t, registry.New(), setup{settings: s})
					r.session.jitter = 0
					r.open()
					go r.run()
					r.pass(time.Minute)
					r.always(d)
					lost := time.Now()
					r.backend.crash()
					synctest.Wait()
					r.client.send(r.client.frame(true, 0, ws.OpPing, nil))
					if test.cause != nil {
						test.cause(r)
					}
					r.wantEnd(time.Hour, test.reason, test.client, "-")
					took := r.endedAt.Sub(lost)
					if took > test.after || test.reason == registry.ResumeTimeout && took != test.after {
						t.Errorf("got the end after %v, want %v", took, test.after)
					}
					if got := r.ended.Sub(r.endedAt); got > time.Second {
						t.Errorf("got Run back after %v, want a second at most", got)
					}
				})
			})
		}
	}
}

func TestAClientThatClosesWhileHeld(t *testing.T) {
	closing := func(r *rig) { r.client.sendClose(1000, "bye") }
	for _, test := range []struct {
		name       string
		queue      []string
		part       bool // of one more message
		end        func(r *rig)
		back       bool // a backend comes back
		delivered  bool
		reason     registry.Reason
		client, to string // what the client and the next backend are told
		at         time.Duration
	}{
		{name: "close, nothing kept", end: closing, back: true, reason: registry.ClientClosed, client: "1000"},
		{name: "close, messages kept", queue: numbered(3, 10), end: closing, back: true, delivered: true, reason: registry.ClientClosed, client: "1000 bye", to: "1000 bye", at: 10 * time.Second},
		{name: "close, in a message", queue: numbered(3, 10), part: true, end: closing, back: true, delivered: true, reason: registry.ClientClosed, client: "1000 bye", to: "1000 bye", at: 10 * time.Second},
		{name: "close, no backend comes", queue: numbered(3, 10), end: closing, reason: registry.ResumeTimeout, client: "1013 no backend available", at: 30 * time.Second},
		{name: "FIN, nothing kept", end: func(r *rig) { r.client.sendFIN() }, back: true, reason: registry.ClientGone, client: "-"},
		{name: "FIN, messages kept", queue: numbered(3, 10), end: func(r *rig) { r.client.sendFIN() }, back: true, delivered: true, reason: registry.ClientGone, client: "-", to: "1001", at: 10 * time.Second},
		{name: "reset, messages kept", queue: numbered(3, 10), end: func(r *rig) { r.client.crash() }, back: true, reason: registry.ClientGone, client: "-"},
		{name: "close, then reset", queue: numbered(3, 10), end: func(r *rig) {
			closing(r)
			r.pass(2 * time.Second)
			r.client.crash()
		}, back: true, reason: registry.ClientGone, client: "-", at: 3 * time.Second},
	} {
		for _, mode := range []replay.Mode{replay.Unacked, replay.Unsent, replay.Strict} {
			t.Run(test.name+", "+mode.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := start(t, setup{settings: resuming(mode), answers: true})
					r.pass(time.Minute)
					r.always(dial{is: fails, after: 100 * time.Millisecond})
					lost := time.Now()
					r.backend.crash()
					synctest.Wait()
					for _, m := range test.queue {
						r.client.send(r.client.text(m))
					}
					if test.part {
						r.client.send(r.client.frame(false, 0, ws.OpText, []byte("part")))
					}
					synctest.Wait()
					test.end(r)
					if test.back {
						time.Sleep(time.Until(lost.Add(5 * time.Second)))
						r.always(dial{})
					}
					r.wait(time.Minute)
					if got := r.rec.Ending().Reason; got != test.reason {
						t.Errorf("got reason %q, want %q", got, test.reason)
					}
					if got := r.client.farewell(t); got != test.client {
						t.Errorf("got client told %q, want %q", got, test.client)
					}
					if took := r.endedAt.Sub(lost); took > test.at {
						t.Errorf("got the end after %v, want %v at most", took, test.at)
					}
					if !test.delivered {
						if len(r.used()) > 1 {
							t.Error("got another backend, want none")
						}
						return
					}
					if len(r.used()) != 2 {
						t.Fatalf("got %d backends, want a second one", len(r.used()))
					}
					if got, _ := r.latest().messages(); !slices.Equal(got, test.queue) {
						t.Errorf("got %q delivered, want all that was kept", got)
					}
					if got := r.latest().farewell(t); got != test.to {
						t.Errorf("got the next backend told %q, want %q", got, test.to)
					}
				})
			})
		}
	}
}
