// This file tests tunnels that are cut, to make room or at the end of a stop.

package tunnel

import (
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestAbort(t *testing.T) {
	eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
		r.rec.Close(registry.Ending{Reason: registry.Shutdown})
		r.tunnel.Abort()
		r.wantEnd(time.Second, registry.Shutdown)
	})
	eachKind(t, Settings{}, "", func(t *testing.T, r *rig, client, backend peer) {
		r.tunnel.Abort()
		r.wantEnd(time.Second, registry.Reset)
		r.tunnel.Abort()
		r.tunnel.Reconsider()
		r.tunnel.End(registry.Ending{Reason: registry.Admin})
		if r.tunnel.Move() == nil {
			t.Error("got Move accepted, want it refused")
		}
	})
}

// wrapped counts how often it is closed.
type wrapped struct {
	embeds
	closed *atomic.Int32
}

func (w wrapped) Close() error {
	w.closed.Add(1)
	return w.embeds.Close()
}

// What wraps a client's connection is caddy-l4's, which goes on with it as soon as Run
// has returned, when who cuts the tunnel may still be at it.
func TestAbortClosesOnlySockets(t *testing.T) {
	nearClient, client := tcpPair(t)
	nearBackend, backend := tcpPair(t)
	var closed atomic.Int32
	r := prepare(t, registry.New(), Settings{}, wrapped{embeds{nearClient}, &closed}, nearBackend, "")
	r.tunnel.Abort()
	wantReset(t, client)
	wantReset(t, backend)
	if n := closed.Load(); n != 0 {
		t.Errorf("got the wrapper closed %d times, want only its socket closed", n)
	}
	r.run()
	r.wantEnd(testTimeout, registry.Reset)
	if n := closed.Load(); n != 1 {
		t.Errorf("got the wrapper closed %d times at the end, want once", n)
	}
}

// lastMoment cuts the tunnel at the moment at which its end is decided.
type lastMoment struct{ *rig }

func (l lastMoment) End(e registry.Ending) {
	l.rig.End(e)
	l.tunnel.Abort()
}

// Who makes room cuts what is closing already. A client that has only to read the rest
// gets all of it, and the end.
func TestAbortOfCompleteStreams(t *testing.T) {
	nearClient, client := tcpPair(t)
	nearBackend, backend := tcpPair(t)
	_ = nearClient.SetWriteBuffer(1 << 20)
	r := start(t, Settings{}, nearClient, nearBackend, "")
	r.rec.Handover(lastMoment{r})
	_ = client.CloseWrite()
	const size = 256 << 10 // more than the client's kernel takes, less than the proxy's
	send(t, backend, strings.Repeat("x", size))
	_ = backend.CloseWrite()
	r.wantEnd(testTimeout, registry.EOF)
	if n, err := io.Copy(io.Discard, client); n != size || err != nil {
		t.Errorf("got %d bytes, %v, want %d and the end", n, err, size)
	}
}
