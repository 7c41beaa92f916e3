// This file tests row I1 of the seed matrix: a network between the proxy and a backend
// that has its bad moments.

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// relay is a network between the proxy and a backend, which has its bad moments.
type relay struct {
	addr, to string
	running  sync.WaitGroup
	stall    sync.RWMutex // while it is locked nothing is forwarded, not even a FIN

	mu    sync.Mutex // protects the fields below
	down  bool       // whatever connects is reset
	conns []*net.TCPConn
}

func startRelay(t testing.TB, to string) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{addr: ln.Addr().String(), to: to}
	t.Cleanup(func() { ln.Close(); r.cut(true); r.running.Wait() })
	r.running.Go(func() { r.accept(ln) })
	return r
}

// cut resets all connections, and new ones until it is called with false.
func (r *relay) cut(down bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = down
	r.reset()
}

// reset resets all connections. relay.mu is held.
func (r *relay) reset() {
	for _, c := range r.conns {
		_ = c.SetLinger(0)
		c.Close()
	}
	r.conns = nil
}

// accept owns the listener's accept loop; closing the listener ends it.
func (r *relay) accept(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		r.running.Go(func() { r.connect(conn.(*net.TCPConn)) })
	}
}

// connect owns a connection and that to the backend. It ends when both ways have.
func (r *relay) connect(from *net.TCPConn) {
	defer from.Close()
	conn, err := net.Dial("tcp", r.to)
	if err != nil {
		return
	}
	to := conn.(*net.TCPConn)
	defer to.Close()
	r.mu.Lock()
	r.conns = append(r.conns, from, to)
	if r.down {
		r.reset()
	}
	r.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { r.forward(from, to) })
	both.Go(func() { r.forward(to, from) })
	both.Wait()
}

// forward owns one way. A FIN ends it and is passed on; what else ends it ends both.
func (r *relay) forward(from, to *net.TCPConn) {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		r.stall.RLock()
		_, failed := to.Write(buf[:n])
		r.stall.RUnlock()
		switch {
		case failed == nil && err == nil:
			continue
		case failed == nil && err == io.EOF:
			_ = to.CloseWrite()
		default:
			from.Close()
			to.Close()
		}
		return
	}
}

// I1: a network that forwards nothing for a while is not noticed, unless that is longer
// than a backend may be silent; then it is a loss, like that of connections which are
// cut. Nobody is dropped, nothing is lost.
func TestI1NetworkInterruptions(t *testing.T) {
	const clients = 8
	cuts := long2(2, 4)
	backend := startBackend(t, "coder", "b")
	slow, bad := startRelay(t, backend.addr), startRelay(t, backend.addr)
	const options = "resume_interval 10ms 100ms"
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy /patient %s {\n name patient\n}\n", slow.addr)+
		fmt.Sprintf("websocket_proxy /impatient %s {\n name impatient\n ping_interval 200ms\n ping_timeout 2s\n %s\n}\n", slow.addr, options)+
		fmt.Sprintf("websocket_proxy /cut %s {\n name cut\n %s\n}\n", bad.addr, options))
	var all []*talker
	for i := range 3 * clients {
		all = append(all, startTalker(t, p, i, []string{"/patient?echo=1", "/impatient", "/cut"}[i/clients]))
	}
	var now map[string]int // by route and state
	settled := func(want ...string) {
		t.Helper()
		if !eventually(15*time.Second, func() bool {
			now = make(map[string]int)
			for _, c := range p.connections(t) {
				now[c.Route+" "+c.State]++
			}
			return !slices.ContainsFunc(want, func(state string) bool { return now[state] != clients })
		}) {
			t.Errorf("connections: got %v, want %d each of %q", now, clients, want)
		}
	}
	p.acknowledged(t)
	slow.stall.Lock()
	for range cuts {
		bad.cut(true)
		settled("cut held")
		pass(200 * time.Millisecond)
		bad.cut(false)
		settled("cut open")
		p.acknowledged(t, "cut")
	}
	settled("patient open", "impatient held", "cut open")
	slow.stall.Unlock()
	settled("patient open", "impatient open", "cut open")
	pass(300 * time.Millisecond)
	finishTalkers(t, all)
	wantWhole(t, all[:clients], 1, backend)
	wantKept(t, all[clients:2*clients], killPromises["unacked"], 2, backend)
	wantKept(t, all[2*clients:], killPromises["unacked"], cuts+1, backend)
}

// acknowledged waits until backends have acknowledged what their clients have said until
// now: those of some routes, or of all.
func (p *proxy) acknowledged(t testing.TB, routes ...string) {
	t.Helper()
	type ledger struct {
		ID, Route string
		Came      int64 `json:"bytes_in"`
		Kept      int64 `json:"buffered_bytes"` // with their headers
	}
	look := func() (all []ledger) {
		t.Helper()
		var list struct{ Connections []ledger }
		p.call(t, http.MethodGet, "/connections?limit=1000", &list)
		return slices.DeleteFunc(list.Connections, func(c ledger) bool { return len(routes) > 0 && !slices.Contains(routes, c.Route) })
	}
	until := make(map[string]int64)
	for _, c := range look() {
		until[c.ID] = max(c.Came, 1)
	}
	var now []ledger
	if !eventually(20*time.Second, func() bool {
		now = look()
		return !slices.ContainsFunc(now, func(c ledger) bool { return c.Came-c.Kept < until[c.ID] })
	}) {
		t.Errorf("connections: got %+v, want acknowledged %v", now, until)
	}
}

// wantKept checks that a backend, whose connections broke, got what a promise says of
// clients that have finished, over so many connections at least.
func wantKept(t testing.TB, all []*talker, p promise, least int, backend *backendProcess) {
	t.Helper()
	of := make(map[int][]*backendConn)
	for _, conns := range backendConns(t, backend) {
		of[senderOf(conns)] = conns
	}
	var sum summary
	for _, k := range all {
		d := &delivery{client: k.id, sent: int(k.sent.Load()), ended: k.end, conns: of[k.id]}
		for _, fault := range d.faults(p, 1006) {
			t.Error(fault)
		}
		if len(d.conns) < least {
			t.Errorf("client %d: got %d connections to backends, want at least %d", k.id, len(d.conns), least)
		}
		sum.add(d)
	}
	t.Logf("%v", &sum)
}

// I1: a connection that is cut every time it has been up for a while costs no client
// its place, though what breaks all backends would (4.4, "Poison"): each backend had
// the time to acknowledge what was replayed.
func TestI1CutsInQuickSuccession(t *testing.T) {
	backend := startBackend(t, "coder", "b")
	bad := startRelay(t, backend.addr)
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n resume_interval 10ms 50ms\n}", bad.addr))
	var all []*talker
	for i := range 20 {
		all = append(all, startTalker(t, p, i, "/"))
	}
	for n := range 3 {
		p.acknowledged(t)
		bad.cut(true)
		bad.cut(false)
		lost := time.Now()
		if !eventually(15*time.Second, func() bool {
			resumed := 0
			for _, c := range p.resumed(t) {
				if c.State == "open" && c.Resumes > n {
					resumed++
				}
			}
			return resumed == len(all)
		}) {
			t.Errorf("cut %d: got %v after %v, want all %d resumed", n+1, p.stats(t).ByState, time.Since(lost), len(all))
		}
	}
	finishTalkers(t, all)
	wantKept(t, all, killPromises["unacked"], 4, backend)
}
