// This file tests, in fake time, what the clock does for a tunnel that ends.

package tunnel

import (
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// What a broken peer said before is for the other one, which gets the time to take
// it: a reset throws away what it has not.
func TestResetWaitsForWhatIsOnItsWay(t *testing.T) {
	for _, test := range []struct {
		name        string
		after       time.Duration
		got         bool
		least, most time.Duration // until the end
	}{
		{"taken in time", activePeriod / 2, true, activePeriod / 2, activePeriod/2 + flushPeriod},
		{"not taken", activePeriod + activePeriod/2, false, activePeriod, activePeriod},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, client, backend := memRig(t, Settings{}, 100)
				send(t, backend, "answer")
				backend.Reset()
				broke := time.Now()
				pass(test.after)
				if test.got {
					wantText(t, client, "answer")
				}
				if n, err := client.Read(make([]byte, 10)); n != 0 || err != syscall.ECONNRESET {
					t.Errorf("got %d bytes, %v, want a reset", n, err)
				}
				r.wantEnd(time.Second, registry.Reset)
				if got := r.ended.Sub(broke); got < test.least || got > test.most {
					t.Errorf("got the end after %v, want %v to %v", got, test.least, test.most)
				}
			})
		})
	}
}

// brokenPipe is a connection that fails in a way that does not say why.
type brokenPipe struct{ *memConn }

func (brokenPipe) Write([]byte) (int, error) { return 0, syscall.EPIPE }

// If whoever reads a leg does not find out why it is broken, the clock decides.
func TestBrokenPipeThatNobodyExplains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nearClient, client := newMemPipe(100)
		nearBackend, _ := newMemPipe(100)
		r := start(t, Settings{}, nearClient, brokenPipe{nearBackend}, "")
		pass(time.Hour)
		send(t, client, "to nobody")
		r.wantEndAfter(time.Now(), answerTimeout, answerTimeout, registry.Reset)
		if _, err := client.Read(make([]byte, 10)); err != syscall.ECONNRESET {
			t.Errorf("got %v, want a reset", err)
		}
	})
}

// A peer that does not take what is for it is cut when the time to close is over,
// and is not told that this was all.
func TestClosingTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, client, backend := memRig(t, Settings{}, 100)
		go func() { _, _ = client.Write(make([]byte, 1000)) }()
		pass(time.Hour)
		closed := time.Now()
		r.rec.Close(registry.Ending{Reason: registry.Admin})
		r.wantEnd(time.Minute, registry.Admin)
		if got := r.ended.Sub(closed); got != registry.ClosingTimeout {
			t.Errorf("got the end after %v, want %v", got, registry.ClosingTimeout)
		}
		if _, err := backend.Read(make([]byte, 10)); err != syscall.ECONNRESET {
			t.Errorf("got %v, want a reset", err)
		}
	})
}
