// This file sets up a tunnel between two peers and checks, at its end, what
// holds for all of them.

package tunnel

import (
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// testRoute is the route of a test's tunnels.
type testRoute struct {
	settings atomic.Pointer[Settings]
	warnings atomic.Int32
	warnedAt atomic.Int64 // the record's age
	idle     atomic.Int64
}

func (r *testRoute) Settings() *Settings { return r.settings.Load() }

func (r *testRoute) Inactive(rec *registry.Conn, idle time.Duration) {
	r.warnings.Add(1)
	r.warnedAt.Store(int64(rec.Age()))
	r.idle.Store(int64(idle))
}

// opening is the owner of a record until its tunnel takes over.
type opening struct{}

func (opening) End(registry.Ending) {}
func (opening) Abort()              {}
func (opening) Reconsider()         {}
func (opening) Move() error         { return errNotMovable }

// rig is a tunnel and its record.
type rig struct {
	testRoute
	t      testing.TB
	reg    *registry.Registry
	route  *registry.Route
	rec    *registry.Conn
	tunnel *Tunnel
	done   chan struct{}
	late   chan struct{} // the tunnel is told of its end when this is closed; nil: at once

	began   time.Time
	decided time.Time // when the end was; read after done
	ended   time.Time // when Run returned; likewise
}

// start opens a tunnel between two connections and runs it. That it ends, and
// leaves nothing, is checked when the test ends.
func start(t testing.TB, set Settings, client, backend net.Conn, early string) *rig {
	t.Helper()
	r := prepare(t, registry.New(), set, client, backend, early)
	r.run()
	return r
}

func (r *rig) run() {
	r.rec.Handover(r)
	go func() {
		defer close(r.done)
		r.tunnel.Run()
		r.ended = time.Now()
	}()
}

// End, Abort, Reconsider and Move put the rig between the record and the tunnel.
func (r *rig) End(e registry.Ending) {
	r.decided = time.Now()
	if r.late != nil {
		<-r.late
	}
	r.tunnel.End(e)
}

func (r *rig) Abort()      { r.tunnel.Abort() }
func (r *rig) Reconsider() { r.tunnel.Reconsider() }
func (r *rig) Move() error { return r.tunnel.Move() }

// prepare opens a tunnel that does not run yet, though it has to.
func prepare(t testing.TB, reg *registry.Registry, set Settings, client, backend net.Conn, early string) *rig {
	t.Helper()
	r := &rig{t: t, reg: reg, began: time.Now(), done: make(chan struct{})}
	r.settings.Store(&set)
	r.route = reg.Retain(registry.Passthrough, "example.com")
	rec, err := reg.Admit(r.route, registry.Info{Kind: registry.Passthrough, Client: "192.0.2.1", Protocol: "tcp"}, opening{})
	if err != nil {
		t.Fatalf("admitting: %v", err)
	}
	r.rec = rec
	if !rec.Open("") {
		t.Fatal("got Open refused, want it open")
	}
	r.tunnel = New(rec, r, client, backend, []byte(early))
	t.Cleanup(r.finish)
	return r
}

// change gives the route other settings, as a reload does.
func (r *rig) change(set Settings) {
	r.settings.Store(&set)
	r.reg.ReconsiderAll(r.route)
}

// wantEnd waits until nothing is left of the tunnel and checks why it ended.
func (r *rig) wantEnd(limit time.Duration, want registry.Reason) {
	r.t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-r.done:
	case <-timer.C:
		r.t.Fatalf("got a tunnel that is %v (reason %q) after %v, want its end", r.rec.State(), r.rec.Ending().Reason, limit)
	}
	if got := r.rec.Ending().Reason; got != want {
		r.t.Errorf("got reason %q, want %q", got, want)
	}
}

func (r *rig) wantCounted(in, out uint64) {
	r.t.Helper()
	if v := r.rec.View(); v.BytesIn != in || v.BytesOut != out {
		r.t.Errorf("got %d bytes in and %d out counted, want %d and %d", v.BytesIn, v.BytesOut, in, out)
	}
}

// finish ends the tunnel if the test has not, and checks that nothing is left.
func (r *rig) finish() {
	if r.rec.Close(registry.Ending{Reason: registry.Admin}) {
		r.tunnel.Abort() // the far ends need not answer
	}
	timer := time.NewTimer(registry.ClosingTimeout + 2*time.Second)
	defer timer.Stop()
	select {
	case <-r.done:
	case <-timer.C:
		r.t.Error("got Run waiting 7s after the end, want it back")
		r.tunnel.Abort()
		<-r.done
	}
	if got := r.rec.State(); got != registry.Closed {
		r.t.Errorf("got state %v after Run, want closed", got)
	}
	if _, found := r.reg.Get(r.rec.ID()); found {
		r.t.Error("got the record in the registry after Run, want it gone")
	}
	for _, l := range []*leg{&r.tunnel.client, &r.tunnel.backend} {
		if _, err := l.conn.Read(make([]byte, 1)); err == nil {
			r.t.Error("got a leg that can be read after Run, want it closed")
		}
	}
}
