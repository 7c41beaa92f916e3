// This file tests write_timeout: how long a peer may take not one byte.

package session

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

var onlyWriteTimeout = Settings{WriteTimeout: 30 * time.Second}

func TestAPeerThatStopsReadingIsEndedAfterTheWriteTimeout(t *testing.T) {
	for _, test := range []struct {
		name            string
		jam             func(r *rig)
		reason          registry.Reason
		client, backend string
		closing         time.Duration // until Run is back
	}{
		{
			"client", func(r *rig) { r.client.stall(); r.backend.send(r.backend.binary(300_000)) },
			registry.WriteTimeout, "-", "1001", registry.ClosingTimeout,
		},
		{
			"backend", func(r *rig) { r.backend.stall(); r.client.send(r.client.binary(300_000)) },
			registry.BackendLost, "1014 backend connection lost", "-", 0,
		},
		{
			"client, while it sends", func(r *rig) {
				r.client.stall()
				r.backend.send(r.backend.binary(300_000))
				go func() {
					for range 100 {
						r.client.send(r.client.text("I live"))
						time.Sleep(time.Second)
					}
				}()
			},
			registry.WriteTimeout, "-", "1001", registry.ClosingTimeout,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, setup{settings: onlyWriteTimeout})
				r.pass(10 * time.Minute)
				stalled := time.Now()
				test.jam(r)
				r.wantEnd(time.Hour, test.reason, test.client, test.backend)
				if got := r.endedAt.Sub(stalled); got < 30*time.Second || got > 32*time.Second {
					t.Errorf("got the end after %v, want 30s to 32s", got)
				}
				if got := r.ended.Sub(r.endedAt); got > test.closing {
					t.Errorf("got Run back %v later, want %v at most", got, test.closing)
				}
				time.Sleep(100 * time.Second) // for the goroutine of a case
			})
		})
	}
}

func TestAPauseShorterThanTheWriteTimeoutIsHarmless(t *testing.T) {
	bothWays(t, setup{settings: onlyWriteTimeout}, func(t *testing.T, r *rig, from, to *peer) {
		for range 10 {
			to.stall()
			from.send(from.binary(200_000))
			r.pass(29 * time.Second)
			to.resume()
			r.pass(time.Second)
		}
		if got, _ := to.messages(); len(got) != 10 || !r.live() {
			t.Errorf("got %d messages (reason %q), want 10", len(got), r.rec.Ending().Reason)
		}
	})
}

func TestAReaderThatTakesSomeBytesEveryTenSecondsLives(t *testing.T) {
	for name, s := range map[string]Settings{"without heartbeats": onlyWriteTimeout, "with heartbeats": defaults} {
		t.Run(name, func(t *testing.T) {
			bothWays(t, setup{settings: s, buffer: 8 << 10}, func(t *testing.T, r *rig, from, to *peer) {
				// What a pump writes at once is what the buffer before it holds, which
				// takes two reads.
				to.behave(func(is *manners) { is.chunk, is.every = 5<<10, 10*time.Second })
				message := from.binary(5000)
				for range 500 {
					from.send(message)
				}
				r.pass(time.Hour)
				if !r.live() {
					t.Errorf("got the end (%s) after %v, want it alive after an hour", r.rec.Ending().Reason, r.lasting)
				}
				if got := len(to.wire()); got < 350*(5<<10) {
					t.Errorf("got %d bytes in an hour, want 5 KiB every 10s", got)
				}
			})
		})
	}
}

func TestWriteTimeoutOffWaitsForEver(t *testing.T) {
	bothWays(t, setup{}, func(t *testing.T, r *rig, from, to *peer) {
		to.stall()
		from.send(from.binary(300_000))
		r.pass(6 * time.Hour)
		if !r.live() {
			t.Fatalf("got the end (%s), want it alive after 6 hours", r.rec.Ending().Reason)
		}
		to.resume()
		synctest.Wait()
		if got, _ := to.messages(); len(got) != 1 {
			t.Errorf("got %d messages, want the one", len(got))
		}
	})
}

func TestAPingThatCannotBeWrittenIsAWriteLikeAnyOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{settings: Settings{PingInterval: 30 * time.Second, PingTimeout: 60 * time.Second, WriteTimeout: 5 * time.Second}, backend: manners{mute: true}})
		r.client.stall()
		// Frame and header fill the buffer to the last byte.
		r.backend.send(r.backend.binary(defaultBuffer - 4))
		synctest.Wait()
		if got := r.legs[clientSide].room(); got != 0 {
			t.Fatalf("got room for %d bytes, want none", got)
		}
		r.wait(10 * time.Minute)
		if got := r.endedAt.Sub(r.began); r.rec.Ending().Reason != registry.WriteTimeout || got < 32*time.Second || got > 37*time.Second {
			t.Errorf("got %s after %v, want write_timeout 5s to 7s after the ping, which was 27s to 30s after the start", r.rec.Ending().Reason, got)
		}
	})
}
