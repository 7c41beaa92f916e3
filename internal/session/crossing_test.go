// This file tests ends that meet: a peer leaves after the record's end was
// decided, and before the session has carried it out. The owner is told late,
// as if the scheduler had let the pumps go first.

package session

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestAPeerThatLeavesAsTheEndBeginsDoesNotKeepItFromTheOther(t *testing.T) {
	for _, test := range []struct {
		name            string
		first, then     func(r *rig)
		reason          registry.Reason
		client, backend string // a | b: either is right, as they cross
	}{
		{
			"admin, then the client sends a FIN", admin, func(r *rig) { r.client.sendFIN() },
			registry.Admin, "-", "1001",
		},
		{
			"admin, then the client resets", admin, func(r *rig) { r.client.conn.Reset() },
			registry.Admin, "-", "1001",
		},
		{
			"admin, then the backend sends a FIN", admin, func(r *rig) { r.backend.sendFIN() },
			registry.Admin, "1001", "-",
		},
		{
			"admin, then the client closes", admin, func(r *rig) { r.client.sendClose(1000, "") },
			registry.Admin, "1000|1001", "1000|1001",
		},
		{
			"admin, then the backend closes", admin, func(r *rig) { r.backend.sendClose(1000, "") },
			registry.Admin, "1000|1001", "1000|1001",
		},
		{
			"the client closes, then the backend sends a FIN",
			func(r *rig) { r.client.sendClose(1000, "") }, func(r *rig) { r.backend.sendFIN() },
			registry.ClientClosed, "1000", "-",
		},
		{
			"the client closes, then the backend resets",
			func(r *rig) { r.client.sendClose(1000, "") }, func(r *rig) { r.backend.conn.Reset() },
			registry.ClientClosed, "1000", "-",
		},
		{
			"the backend closes, then the client sends a FIN",
			func(r *rig) { r.backend.sendClose(1000, "") }, func(r *rig) { r.client.sendFIN() },
			registry.BackendClosed, "-", "1000",
		},
		{
			"the backend closes, then the client closes",
			func(r *rig) { r.backend.sendClose(1000, "") }, func(r *rig) { r.client.sendClose(1000, "") },
			registry.BackendClosed, "1000", "1000",
		},
		{
			"the client breaks the protocol, then the backend sends a FIN",
			func(r *rig) { r.client.send(r.backend.text("unmasked")) }, func(r *rig) { r.backend.sendFIN() },
			registry.ClientProtocol, "1002 protocol error", "-",
		},
		{
			"the client sends a FIN, then the backend closes",
			func(r *rig) { r.client.sendFIN() }, func(r *rig) { r.backend.sendClose(1000, "") },
			registry.ClientGone, "-", "1000|1001",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{endDelay: 10 * time.Millisecond})
				// A client that sends a FIN still reads.
				r.client.behave(func(is *manners) { is.silent = true })
				test.first(r)
				synctest.Wait()
				if r.live() {
					t.Fatal("got the session open, want its end decided")
				}
				test.then(r)
				r.wait(time.Minute)
				if got := r.ended.Sub(r.endedAt); got > activePeriod*5/4 {
					t.Errorf("got Run back %v after the end began, want a second", got)
				}
				if got := r.rec.Ending().Reason; got != test.reason {
					t.Errorf("got reason %q, want %q", got, test.reason)
				}
				if got := r.client.farewell(t); !oneOf(got, test.client) {
					t.Errorf("got client told %q, want %q", got, test.client)
				}
				if got := r.backend.farewell(t); !oneOf(got, test.backend) {
					t.Errorf("got backend told %q, want %q", got, test.backend)
				}
			})
		})
	}
}

func admin(r *rig) { go r.rec.Close(registry.Ending{Reason: registry.Admin}) }

func oneOf(got, want string) bool { return slices.Contains(strings.Split(want, "|"), got) }
