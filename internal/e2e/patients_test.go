// This file is backends that are probed, and what the API tells of upstreams.

package e2e

import (
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// patient is a backend whose answers a test decides, by the path that is asked for.
// It echoes where nothing was decided. Clients in these tests ask for /chat.
type patient struct {
	addr string

	mu       sync.Mutex
	answers  map[string]script
	requests map[string][]*http.Request
	history  []*http.Request     // all of these, in order
	codes    map[string][]uint16 // of the close frames that came
}

func startPatient(t testing.TB) *patient {
	t.Helper()
	b := newPatient()
	b.addr = rawBackend(t, b.serve)
	return b
}

func newPatient() *patient {
	return &patient{answers: make(map[string]script), requests: make(map[string][]*http.Request), codes: make(map[string][]uint16)}
}

// listen has the patient serve what a listener accepts.
func (b *patient) listen(t testing.TB, ln net.Listener) {
	t.Helper()
	b.addr = ln.Addr().String()
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptRaw(ln, b.serve, done)
}

func (b *patient) serve(r *http.Request, c *rawConn) {
	b.mu.Lock()
	b.requests[r.URL.Path] = append(b.requests[r.URL.Path], r)
	b.history = append(b.history, r)
	answer := b.answers[r.URL.Path]
	b.mu.Unlock()
	if answer == nil {
		answer = b.echo()
	}
	answer(r, c)
}

// echo is a backend that sends text back, and notes with which code it was closed.
// Extra lines of its 101 end with CRLF.
func (b *patient) echo(extra ...string) script {
	return func(r *http.Request, c *rawConn) {
		if c.accept(r, extra...) != nil {
			return
		}
		for {
			h, payload, err := c.receive()
			if err != nil {
				return
			}
			h.Masked, h.Mask = false, [4]byte{}
			switch h.OpCode {
			case ws.OpPing:
				h.OpCode = ws.OpPong
			case ws.OpClose:
				if len(payload) >= 2 {
					b.mu.Lock()
					b.codes[r.URL.Path] = append(b.codes[r.URL.Path], uint16(payload[0])<<8|uint16(payload[1]))
					b.mu.Unlock()
				}
			default:
			}
			if ws.WriteHeader(c, h) != nil {
				return
			}
			if _, err := c.Write([]byte(payload)); err != nil || h.OpCode == ws.OpClose {
				return
			}
		}
	}
}

// answer decides what happens to requests for a path from now on; nil: an echo.
func (b *patient) answer(path string, s script) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answers[path] = s
}

// answering returns what was decided for a path last.
func (b *patient) answering(path string) script {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.answers[path]
}

// asked returns the requests for a path that have come.
func (b *patient) asked(path string) []*http.Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.requests[path])
}

// all returns all requests that have come.
func (b *patient) all() []*http.Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.history)
}

// closed returns the codes by which connections to a path were closed.
func (b *patient) closed(path string) []uint16 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.codes[path])
}

// upstreamView is an upstream as the admin API shows it.
type upstreamView struct {
	Route, Upstream, Dial string
	Healthy, Draining     bool
	Connections, Fails    int
}

// views returns all upstreams, as the API orders them.
func (p *proxy) views(t testing.TB) (all []upstreamView) {
	t.Helper()
	if status := p.call(t, http.MethodGet, "/connections/upstreams", &all); status != http.StatusOK {
		t.Fatalf("GET /connections/upstreams: status %d", status)
	}
	return all
}

// view returns an upstream of the only route that has it.
func (p *proxy) view(t testing.TB, upstream string) upstreamView {
	t.Helper()
	all := p.views(t)
	i := slices.IndexFunc(all, func(v upstreamView) bool { return v.Upstream == upstream })
	if i < 0 {
		t.Fatalf("upstreams: got %+v, want %s among them", all, upstream)
	}
	return all[i]
}

// waitHealth waits until upstreams, of the only route that has them, are healthy or not.
func (p *proxy) waitHealth(t testing.TB, limit time.Duration, want map[string]bool) {
	t.Helper()
	got := make(map[string]bool)
	if !eventually(limit, func() bool {
		clear(got)
		for _, v := range p.views(t) {
			if _, ok := want[v.Upstream]; ok {
				got[v.Upstream] = v.Healthy
			}
		}
		return maps.Equal(got, want)
	}) {
		t.Fatalf("healthy after %v: got %v, want %v", limit, got, want)
	}
}

// letIn opens a connection and has a message echoed. It returns the upstream.
func (p *proxy) letIn(t testing.TB) (c *rawConn, upstream string) {
	t.Helper()
	before := make(map[string]bool)
	for _, known := range p.connections(t) {
		before[known.ID] = true
	}
	c = rawDial(t, p.addr, "")
	c.send(t, ws.OpText, "hello")
	c.wantText(t, "hello")
	for _, now := range p.connections(t) {
		if !before[now.ID] {
			return c, now.Upstream
		}
	}
	t.Fatalf("the connection is not listed: %+v", p.connections(t))
	return nil, ""
}

// visits opens n connections and returns how many each upstream got.
func (p *proxy) visits(t testing.TB, n int) map[string]int {
	t.Helper()
	got := make(map[string]int)
	for range n {
		c, upstream := p.letIn(t)
		got[upstream]++
		c.sendClose(t, 1000, "")
		if code, _, _, err := c.receiveClose(); err != nil || code != 1000 {
			t.Fatalf("close: got %d, %v; want 1000", code, err)
		}
	}
	return got
}

// status asks for a WebSocket and returns the status of the answer.
func (p *proxy) status(t testing.TB) int {
	t.Helper()
	res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
	defer c.Close()
	return res.StatusCode
}

// upgradeTo is a handshake for a path, with these lines in its header.
func upgradeTo(path string, header ...string) string {
	return "GET " + path + " HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " +
		testKey + "\r\n" + strings.Join(header, "\r\n") + "\r\n\r\n"
}

// one is what visits returns when each upstream got one connection.
func one(upstreams ...string) map[string]int {
	m := make(map[string]int)
	for _, u := range upstreams {
		m[u] = 1
	}
	return m
}

// wantVisits checks how upstreams share connections.
func wantVisits(t testing.TB, what string, got, want map[string]int) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Errorf("connections %s: got %v, want %v", what, got, want)
	}
}

// schedule is when upstreams are probed.
func schedule(interval, timeout time.Duration, fails, passes int) string {
	return fmt.Sprintf("health_interval %v\n health_timeout %v\n health_fails %d\n health_passes %d\n", interval, timeout, fails, passes)
}
