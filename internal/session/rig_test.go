// This file sets up a session between two peers and checks, at its end, what
// holds for all of them.

package session

import (
	"crypto/tls"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// defaults are what a route has unless it says otherwise.
var defaults = Settings{PingInterval: 30 * time.Second, PingTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second}

// setup says how a rig begins. The zero value has no limits and no heartbeats.
type setup struct {
	settings        Settings
	buffer          int // of each direction of each leg; 0: defaultBuffer
	compressed      bool
	earlyClient     func(p *peer) []byte
	earlyBackend    func(p *peer) []byte
	client, backend manners
	answers         bool          // the upstream has answered a ping before
	others          []string      // more upstreams
	blind           bool          // nothing is known of the first two legs' sockets
	lateEnd         bool          // the end of the first backend's stream is found late
	secure          bool          // the first backend's leg has TLS
	endDelay        time.Duration // how late the owner is told of the end
}

// rig is a session, its two peers and its registry.
type rig struct {
	t               *testing.T
	reg             *registry.Registry
	route           *registry.Route
	upstream        *registry.Upstream
	rec             *registry.Conn
	session         *Session
	client, backend *peer
	legs            [2]*memConn
	*testRoute

	began   time.Time
	done    chan struct{}
	ended   time.Time // when Run returned
	lasting time.Duration

	endDelay time.Duration
	ends     atomic.Int32
	endedAt  time.Time // when the owner was told; read after done
	reason   registry.Reason
}

// start opens a session and runs it. What holds for all is checked when the test ends.
func start(t *testing.T, with setup) *rig {
	t.Helper()
	return startIn(t, registry.New(), with)
}

func startIn(t *testing.T, reg *registry.Registry, with setup) *rig {
	t.Helper()
	r := prepare(t, reg, with)
	r.open()
	go r.run()
	synctest.Wait()
	return r
}

// open makes the rig the owner of an open record.
func (r *rig) open() {
	r.t.Helper()
	if !r.rec.Open("") {
		r.t.Fatal("got Open refused, want it open")
	}
	if got := r.rec.State(); got != registry.Open {
		r.t.Fatalf("got state %v, want open", got)
	}
	r.rec.Handover(r)
}

// opening is the owner of a record until its session takes over.
type opening struct{}

func (opening) End(registry.Ending) {}
func (opening) Abort()              {}
func (opening) Reconsider()         {}
func (opening) Move() error         { return ErrNotMovable }

// prepare makes a session that does not run yet, though it has to.
func prepare(t *testing.T, reg *registry.Registry, with setup) *rig {
	t.Helper()
	if with.buffer == 0 {
		with.buffer = defaultBuffer
	}
	r := &rig{t: t, reg: reg, began: time.Now(), done: make(chan struct{}), endDelay: with.endDelay, testRoute: newTestRoute(with.settings)}
	r.route = r.reg.Retain(registry.WebSocket, "example.com#1")
	var far [2]*memConn
	for side := range r.legs {
		r.legs[side], far[side] = newMemPipe(with.buffer)
	}
	far[backendSide].in.log = new([]byte)
	r.testRoute.reg, r.testRoute.buffer = r.route, with.buffer
	r.names = append(r.names, with.others...)
	r.client = newPeer(far[clientSide], true, with.client)
	r.backend = newPeer(far[backendSide], false, with.backend)
	r.backend.upstream = firstUpstream
	r.backends, r.near = []*peer{r.backend}, r.legs[backendSide:]
	rec, err := r.reg.Admit(r.route, registry.Info{Kind: registry.WebSocket, Client: "192.0.2.1", Protocol: "h1"}, opening{})
	if err != nil {
		t.Fatalf("admitting: %v", err)
	}
	r.rec = rec
	r.upstream = r.route.Choose(func(func(string) registry.Load) string { return firstUpstream })
	rec.Attempt(r.upstream, "10.0.0.1:80", time.Time{})
	if with.answers {
		r.upstream.Answers.Store(true)
	}
	early := func(of func(*peer) []byte, p *peer) []byte {
		if of == nil {
			return nil
		}
		return of(p)
	}
	seen := func(c Conn) Conn {
		if with.blind {
			return blind{c}
		}
		return c
	}
	backend := seen(r.legs[backendSide])
	if with.lateEnd {
		backend = lateEnd{r.legs[backendSide]}
	}
	if with.secure {
		backend = tls.Client(netConn{r.legs[backendSide]}, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // who it is does not matter
	}
	r.session = New(rec, r, r.upstream,
		Peer{Conn: seen(r.legs[clientSide]), Early: early(with.earlyClient, r.client)},
		Peer{Conn: backend, Early: early(with.earlyBackend, r.backend)}, with.compressed)
	t.Cleanup(r.finish)
	return r
}

func (r *rig) run() {
	defer close(r.done)
	r.session.Run()
	r.ended = time.Now()
	r.lasting = r.ended.Sub(r.began)
}

// End, Abort and Reconsider put the rig between the record and the session.
func (r *rig) End(e registry.Ending) {
	if r.ends.Add(1) > 1 {
		r.t.Error("got End twice, want it once")
	}
	if got := r.rec.State(); got != registry.Closing {
		r.t.Errorf("got state %v when the end began, want closing", got)
	}
	r.endedAt, r.reason = time.Now(), e.Reason
	if r.endDelay > 0 {
		time.Sleep(r.endDelay) // as if the scheduler had let others go first
	}
	r.session.End(e)
}

func (r *rig) Abort()      { r.session.Abort() }
func (r *rig) Reconsider() { r.session.Reconsider() }
func (r *rig) Move() error { return r.session.Move() }

// ownPing returns the payload of a ping of the session's own.
func (r *rig) ownPing() []byte {
	r.session.mu.Lock()
	defer r.session.mu.Unlock()
	return r.session.own.next()
}

// change gives the route other settings, as a reload does.
func (r *rig) change(s Settings) {
	r.settings.Store(&s)
	r.reg.ReconsiderAll(r.route)
	synctest.Wait()
}

// live reports whether the session is still open.
func (r *rig) live() bool { return r.rec.State() == registry.Open }

// pass lets fake time pass, and everything that happens meanwhile.
func (r *rig) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// wait waits until Run has returned and returns how long that took.
func (r *rig) wait(limit time.Duration) time.Duration {
	r.t.Helper()
	began := time.Now()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-r.done:
	case <-timer.C:
		if r.rec.State() == registry.Closed {
			break
		}
		r.t.Fatalf("got a session that is %v (reason %q) after %v, want its end", r.rec.State(), r.rec.Ending().Reason, limit)
	}
	synctest.Wait() // the peers have seen it too
	return r.ended.Sub(began)
}

// wantEnd waits for the end and checks why it came and what both peers were told. Of the
// backend, "a | b" says that either is right, as they cross.
func (r *rig) wantEnd(limit time.Duration, reason registry.Reason, client, backend string) time.Duration {
	r.t.Helper()
	took := r.wait(limit)
	r.wantTold(reason, client, backend)
	return took
}

func (r *rig) wantTold(reason registry.Reason, client, backend string) {
	r.t.Helper()
	if got := r.rec.Ending().Reason; got != reason {
		r.t.Errorf("got reason %q, want %q", got, reason)
	}
	if got := r.client.farewell(r.t); got != client {
		r.t.Errorf("got client told %q, want %q", got, client)
	}
	if got := r.backend.farewell(r.t); !slices.Contains(strings.Split(backend, " | "), got) {
		r.t.Errorf("got backend told %q, want %q", got, backend)
	}
}

// finish ends the session if the test has not, and checks that nothing is left.
func (r *rig) finish() {
	r.rec.Close(registry.Ending{Reason: registry.Admin})
	timer := time.NewTimer(registry.ClosingTimeout + r.endDelay + time.Second)
	defer timer.Stop()
	select {
	case <-r.done:
	case <-timer.C:
		r.t.Error("got Run waiting 6s after the end, want it back")
		r.session.Abort()
		<-r.done
	}
	time.Sleep(r.endDelay) // an End that came late is over
	if got := r.rec.State(); got != registry.Closed {
		r.t.Errorf("got state %v after Run, want closed", got)
	}
	if _, found := r.reg.Get(r.rec.ID()); found {
		r.t.Error("got the record in the registry after Run, want it gone")
	}
	if got := r.ends.Load(); got != 1 {
		r.t.Errorf("got End called %d times, want once", got)
	}
	if got := r.rec.Ending().Reason; got != r.reason {
		r.t.Errorf("got reason %q, want the first one, %q", got, r.reason)
	}
	for side, leg := range slices.Concat(r.legs[:clientSide+1], r.near) {
		if !leg.closed() {
			r.t.Errorf("got leg %d open after Run, want it closed", side)
		}
	}
	for _, name := range r.names {
		if got := r.places(name); got != 0 && r.reg.Len() == 0 {
			r.t.Errorf("got %d places taken in the count of %s after Run, want none", got, name)
		}
	}
	if got := r.session.queue.Buffered(); got != 0 {
		r.t.Errorf("got %d bytes kept after Run, want none", got)
	}
	r.client.leave()
	for _, p := range r.backends {
		p.leave()
	}
	r.reg.Release(r.route)
	if got := r.reg.ReplayMemory.Used(); got != 0 && r.reg.Len() == 0 {
		r.t.Errorf("got %d bytes of replay memory used after all, want none", got)
	}
}

// places returns how many connections an upstream has.
func (r *rig) places(upstream string) (n int) {
	r.route.Choose(func(load func(string) registry.Load) string {
		n = load(upstream).Conns
		return ""
	})
	return n
}
