// This file tests every reason for an end: what both peers are told, and how
// long it takes until nothing is left, if they answer and if they do not.

package session

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// ending is a reason, what brings it about, and what follows. A text of "-" is
// no close frame.
type ending struct {
	name            string
	with            setup
	cause           func(r *rig)
	reason          registry.Reason
	client, backend string

	// What differs if the peers answer nothing: the one who closed gets its own
	// code back, but not its text.
	silentClient, silentBackend string
	// How long it takes until Run returns if the peers answer nothing.
	silent time.Duration
	// How long until the cause is noticed, at most.
	noticed time.Duration
}

var endings = []ending{
	{
		name: "client closes", cause: func(r *rig) { r.client.sendClose(1000, "bye") },
		reason: registry.ClientClosed, client: "1000 bye", backend: "1000 bye", silentClient: "1000", silent: time.Second,
	},
	{
		name: "client closes without a code", cause: func(r *rig) { r.client.sendClose(1005, "") },
		reason: registry.ClientClosed, client: "empty", backend: "empty", silent: time.Second,
	},
	{
		name: "client closes with a code of its own", cause: func(r *rig) { r.client.sendClose(4321, strings.Repeat("ü", 61)) },
		reason: registry.ClientClosed, client: "4321 " + strings.Repeat("ü", 61), backend: "4321 " + strings.Repeat("ü", 61),
		silentClient: "4321", silent: time.Second,
	},
	{
		name: "client closes in the middle of a message", cause: func(r *rig) {
			r.client.send(r.client.frame(false, 0, ws.OpText, []byte("begun")))
			r.client.sendClose(1001, "")
		},
		reason: registry.ClientClosed, client: "1001", backend: "1001", silent: time.Second,
	},
	{
		name: "client sends a FIN", cause: func(r *rig) { r.client.sendFIN() },
		reason: registry.ClientGone, client: "-", backend: "1001", silent: time.Second,
	},
	{
		name: "client sends a FIN in the middle of a frame", cause: func(r *rig) {
			r.client.send(r.client.text("torn")[:7])
			r.client.sendFIN()
		},
		reason: registry.ClientGone, client: "-", backend: "1001", silent: time.Second,
	},
	{
		name: "client resets", cause: func(r *rig) { r.client.conn.Reset() },
		reason: registry.ClientGone, client: "-", backend: "1001", silent: time.Second,
	},
	{
		name: "client vanishes while it is written to", cause: func(r *rig) {
			r.client.stall()
			r.backend.send(r.backend.binary(200_000))
			synctest.Wait()
			r.client.conn.Reset()
		},
		reason: registry.ClientGone, client: "-", backend: "1001", silent: time.Second,
	},
	{
		name: "client refuses what is written", cause: func(r *rig) {
			r.client.conn.CloseRead()
			r.backend.send(r.backend.text("refused"))
		},
		reason: registry.ClientGone, client: "-", backend: "1001", silent: time.Second, noticed: 2 * time.Second,
	},
	{
		name: "backend closes", cause: func(r *rig) { r.backend.sendClose(1000, "done") },
		reason: registry.BackendClosed, client: "1000 done", backend: "1000 done",
		// A second for the client, and one for the backend once it has its echo.
		silentBackend: "1000", silent: 2 * time.Second,
	},
	{
		name: "backend closes without a code", cause: func(r *rig) { r.backend.sendClose(1005, "") },
		reason: registry.BackendClosed, client: "empty", backend: "empty", silent: 2 * time.Second,
	},
	{
		name: "backend closes and does not wait for the answer", cause: func(r *rig) {
			r.backend.sendClose(1012, "restarting")
			r.backend.sendFIN()
		},
		// The client's answer may be faster than the backend's end.
		reason: registry.BackendClosed, client: "1012 restarting", backend: "- | 1012 restarting", silent: time.Second,
	},
	{
		name: "backend sends a FIN", cause: func(r *rig) { r.backend.sendFIN() },
		reason: registry.BackendLost, client: "1014 backend connection lost", backend: "-", silent: time.Second,
	},
	{
		name: "backend resets", cause: func(r *rig) { r.backend.conn.Reset() },
		reason: registry.BackendLost, client: "1014 backend connection lost", backend: "-", silent: time.Second,
	},
	{
		name: "backend refuses what is written", cause: func(r *rig) {
			r.backend.conn.CloseRead()
			r.client.send(r.client.text("refused"))
		},
		reason: registry.BackendLost, client: "1014 backend connection lost", backend: "-", silent: time.Second, noticed: 2 * time.Second,
	},
	{
		name: "backend vanishes in the middle of a message", cause: func(r *rig) {
			r.backend.send(r.backend.binary(200_000)[:100_000])
			synctest.Wait()
			r.backend.conn.Reset()
		},
		reason: registry.BackendLost, client: "1014 backend connection lost", backend: "-", silent: time.Second,
	},
	{
		name: "client breaks the protocol", cause: func(r *rig) { r.client.send(r.backend.text("unmasked")) },
		reason: registry.ClientProtocol, client: "1002 protocol error", backend: "1001", silent: time.Second,
	},
	{
		name: "client closes with a forbidden code", cause: func(r *rig) { r.client.send(r.client.closeFrame(1006, "")) },
		reason: registry.ClientProtocol, client: "1002 protocol error", backend: "1001", silent: time.Second,
	},
	{
		name: "backend breaks the protocol", cause: func(r *rig) { r.backend.send(r.client.text("masked")) },
		reason: registry.BackendBroke, client: "1014 backend protocol error", backend: "1002", silent: time.Second,
	},
	{
		name: "client sends a message that is too big", with: setup{settings: limited(100, 0)},
		cause:  func(r *rig) { r.client.send(r.client.binary(101)) },
		reason: registry.TooBig, client: "1009 message too big", backend: "1001", silent: time.Second,
	},
	{
		name: "backend sends a message that is too big", with: setup{settings: limited(0, 100)},
		cause:  func(r *rig) { r.backend.send(r.backend.binary(101)) },
		reason: registry.TooBig, client: "1009 message too big", backend: "1009", silent: time.Second,
	},
	{
		name: "no data message either way", with: setup{settings: Settings{IdleTimeout: time.Minute}}, noticed: time.Minute,
		reason: registry.Idle, client: "1001 idle", backend: "1001", silent: time.Second,
	},
	{
		name: "never a data message", with: setup{settings: Settings{FirstDataTimeout: time.Minute}}, noticed: time.Minute,
		reason: registry.NoData, client: "1001 no data", backend: "1001", silent: time.Second,
	},
	{
		name: "lifetime", with: setup{settings: Settings{MaxLifetime: 10 * time.Minute}}, noticed: 10 * time.Minute,
		reason: registry.Lifetime, client: "1001 end of lifetime", backend: "1001", silent: time.Second,
	},
	{
		name: "client answers no ping", with: setup{settings: defaults, client: manners{mute: true}}, noticed: 61 * time.Second,
		reason: registry.PingTimeout, client: "1001 ping timeout", backend: "1001", silent: time.Second,
	},
	{
		name: "backend answers no ping any more", with: setup{settings: defaults, backend: manners{mute: true}, answers: true}, noticed: 61 * time.Second,
		reason: registry.BackendLost, client: "1014 backend connection lost", backend: "-", silent: time.Second,
	},
	{
		name: "client takes nothing", with: setup{settings: Settings{WriteTimeout: 30 * time.Second}}, noticed: 32 * time.Second,
		cause: func(r *rig) {
			r.client.stall()
			r.backend.send(r.backend.binary(200_000))
			time.AfterFunc(33*time.Second, r.client.resume)
		},
		reason: registry.WriteTimeout, client: "1001 write timeout", backend: "1001", silent: 5 * time.Second,
	},
	{
		name: "backend takes nothing", with: setup{settings: Settings{WriteTimeout: 30 * time.Second}}, noticed: 32 * time.Second,
		cause: func(r *rig) {
			r.backend.stall()
			r.client.send(r.client.binary(200_000))
		},
		reason: registry.BackendLost, client: "1014 backend connection lost", backend: "-", silent: time.Second,
	},
	{
		name: "planned end", noticed: 10 * time.Second,
		cause: func(r *rig) {
			r.rec.CloseAt(time.Now().Add(10*time.Second), registry.Ending{Reason: registry.Orphan})
		},
		reason: registry.Orphan, client: "1001 route removed", backend: "1001", silent: time.Second,
	},
	{
		name: "shutdown", cause: func(r *rig) {
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				if cut := r.reg.Shutdown(ctx); cut != 0 {
					r.t.Errorf("got %d connections cut, want none", cut)
				}
			}()
		},
		reason: registry.Shutdown, client: "1012 server shutting down", backend: "1001", silent: time.Second,
	},
	{
		name: "admin", cause: func(r *rig) { r.rec.Close(registry.Ending{Reason: registry.Admin}) },
		reason: registry.Admin, client: "1001", backend: "1001", silent: time.Second,
	},
	{
		name: "admin with code and text", cause: func(r *rig) {
			r.rec.Close(registry.Ending{Reason: registry.Admin, Code: 4000, Text: "moved"})
		},
		reason: registry.Admin, client: "4000 moved", backend: "1001", silent: time.Second,
	},
	{
		// Not that it can happen: pressure ends none that is not ending already.
		name: "pressure", cause: func(r *rig) { r.rec.Close(registry.Ending{Reason: registry.Pressure}) },
		reason: registry.Pressure, client: "1013 too many connections", backend: "1001", silent: time.Second,
	},
	{
		name: "admin in the middle of messages", cause: func(r *rig) {
			r.client.send(r.client.frame(false, 0, ws.OpText, []byte("begun")))
			r.backend.send(r.backend.binary(200_000)[:100_000])
			synctest.Wait()
			r.rec.Close(registry.Ending{Reason: registry.Admin})
		},
		reason: registry.Admin, client: "1001", backend: "1001", silent: time.Second,
	},
}

// begin starts a session and brings the end about.
func (e ending) begin(t *testing.T, client, backend func(*manners)) (r *rig) {
	t.Helper()
	with := e.with
	client(&with.client)
	backend(&with.backend)
	r = start(t, with)
	if e.cause != nil {
		e.cause(r)
	}
	return r
}

func polite(*manners)    {}
func silent(is *manners) { is.silent = true }

// wantTime checks how long the end took after it had begun. While a session is
// closing its clock looks four times a second.
func (r *rig) wantTime(noticed, most time.Duration) {
	r.t.Helper()
	if got := r.endedAt.Sub(r.began); got > noticed {
		r.t.Errorf("got the end noticed after %v, want at most %v", got, noticed)
	}
	if got := r.ended.Sub(r.endedAt); got > most+activePeriod/4 {
		r.t.Errorf("got Run back %v after the end began, want at most %v", got, most)
	}
}

func TestPeersThatAnswerAreTold(t *testing.T) {
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := e.begin(t, polite, polite)
				r.wantEnd(time.Hour, e.reason, e.client, e.backend)
				most := time.Duration(0)
				switch e.reason {
				case registry.WriteTimeout:
					most = registry.ClosingTimeout // its close frame waits behind the data
				case registry.ClientProtocol, registry.TooBig:
					most = time.Second // nothing that it says is understood any more
				default: // at once
				}
				r.wantTime(e.noticed, most)
			})
		})
	}
}

func TestWhoAnswersIsNotToldAgain(t *testing.T) {
	for _, e := range endings {
		for who, is := range map[string][2]func(*manners){"client": {polite, silent}, "backend": {silent, polite}} {
			t.Run(e.name+", the "+who+" answers", func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := e.begin(t, is[clientSide], is[backendSide])
					r.wait(time.Hour)
					if got := r.rec.Ending().Reason; got != e.reason {
						t.Errorf("got reason %q, want %q", got, e.reason)
					}
					r.client.farewell(t) // at most one close frame, nothing after it
					r.backend.farewell(t)
					r.wantTime(e.noticed, max(e.silent, time.Second))
				})
			})
		}
	}
}

func TestSilentPeersAreToldAndLeft(t *testing.T) {
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if e.silentClient != "" {
					e.client = e.silentClient
				}
				if e.silentBackend != "" {
					e.backend = e.silentBackend
				}
				r := e.begin(t, silent, silent)
				r.wantEnd(time.Hour, e.reason, e.client, e.backend)
				r.wantTime(e.noticed, e.silent)
			})
		})
	}
}
