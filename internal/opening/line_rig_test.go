// This file is what a test of re-dials needs: backends with a script, a pool, and a
// connection.

package opening

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// backend answers handshakes by its script: a status, or 101 with some lines more.
type backend struct {
	status int
	lines  []string
	early  string
	refuse error         // of the dial
	wait   chan struct{} // closed when it may answer; nil: at once

	mu       sync.Mutex
	requests []*http.Request
	open     int // connections
	dialing  int // those that are not answered yet
	most     int // … at once
}

// dial connects to the backend.
func (b *backend) dial(context.Context) (net.Conn, error) {
	if b.refuse != nil {
		return nil, b.refuse
	}
	near, far := net.Pipe()
	b.mu.Lock()
	b.open++
	b.dialing++
	b.most = max(b.most, b.dialing)
	b.mu.Unlock()
	go b.serve(far)
	return near, nil
}

// serve owns one connection: it ends when the other side closes it.
func (b *backend) serve(conn net.Conn) {
	defer func() {
		conn.Close()
		b.mu.Lock()
		b.open--
		b.mu.Unlock()
	}()
	br := bufio.NewReader(conn)
	r, err := http.ReadRequest(br)
	if err != nil {
		return
	}
	b.mu.Lock()
	b.requests = append(b.requests, r)
	b.mu.Unlock()
	if b.wait != nil {
		<-b.wait
	}
	answer := fmt.Sprintf("HTTP/1.1 %d Status\r\nContent-Length: 0\r\n\r\n", b.status)
	if b.status == http.StatusSwitchingProtocols {
		answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " +
			handshake.AcceptKey(r.Header.Get("Sec-WebSocket-Key")) + "\r\n" + strings.Join(append(b.lines, ""), "\r\n") + "\r\n" + b.early
	}
	b.mu.Lock()
	b.dialing--
	b.mu.Unlock()
	if _, err := io.WriteString(conn, answer); err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, br)
}

// asked returns the Holdfast-Resume headers that the backend got.
func (b *backend) asked() (resume []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.requests {
		resume = append(resume, r.Header.Get("Holdfast-Resume"))
	}
	return resume
}

// testPool is a route with named upstreams, in the order in which they are tried.
type testPool struct {
	route       *registry.Route
	backends    map[string]*backend
	names       []string
	concurrency int
	redials     []string // the calls of Redial

	mu    sync.Mutex
	tried []string // what Tried was told: upstream, and whether it was of use
}

func (p *testPool) Settings() *session.Settings    { return new(session.Settings) }
func (p *testPool) Leaves(string) bool             { return false }
func (p *testPool) Others(string) bool             { return true }
func (p *testPool) Lost(*registry.Upstream)        {}
func (p *testPool) Unanswering(*registry.Upstream) {}

func (p *testPool) Redial(_ *handshake.Request, _ map[string]pool.Address, why pool.Why, last string) Config {
	p.redials = append(p.redials, fmt.Sprintf("last=%s move=%t", last, why == pool.Moving))
	names := slices.Clone(p.names)
	return Config{
		Next: func(context.Context) *pool.Target {
			if len(names) == 0 {
				return nil
			}
			name := names[0]
			names = names[1:]
			addr, err := pool.ParseAddress(name + ".test:80")
			if err != nil {
				panic(err)
			}
			return &pool.Target{
				Place: p.route.Choose(func(func(string) registry.Load) string { return name }), Addr: addr,
				Dial: p.backends[name].dial,
			}
		},
		Tried: func(t *pool.Target, _ time.Duration, err error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.tried = append(p.tried, fmt.Sprintf("%s: %t", t.Place.Key(), err == nil))
		},
		DialTimeout: time.Second, HandshakeTimeout: 2 * time.Second, Concurrency: p.concurrency, Logger: zap.NewNop(),
	}
}

// places returns how many places are taken at an upstream.
func (p *testPool) places(name string) (n int) {
	p.route.Choose(func(load func(string) registry.Load) string {
		n = load(name).Conns
		return ""
	})
	return n
}

// told is what the client was told when its connection was opened.
type told struct {
	subprotocol string
	offer       []string // the client's Sec-WebSocket-Extensions
	answer      []string // the first backend's
}

// newTestLine makes a connection whose client was told something, on a route with
// upstreams a and b.
func newTestLine(t *testing.T, was told, backends map[string]*backend, names ...string) (*line, *testPool) {
	t.Helper()
	reg := registry.New()
	p := &testPool{route: reg.Retain(registry.WebSocket, "route"), backends: backends, names: names, concurrency: 64}
	rec, err := reg.Admit(p.route, registry.Info{Kind: registry.WebSocket}, New(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	offer := deflate.Negotiate(was.offer, deflate.On)
	q, err := handshake.NewRequest(clientRequest(t), handshake.Client{ID: rec.ID()}, offer, nil)
	if err != nil {
		t.Fatal(err)
	}
	agreed, err := offer.Accept(was.answer)
	if err != nil {
		t.Fatal(err)
	}
	return newLine(rec, p, &Answer{request: q, res: &handshake.Response{Subprotocol: was.subprotocol, Compression: agreed}}, nil), p
}

// admit begins the opening of a connection on the pool's route.
func admit(t *testing.T, reg *registry.Registry, p *testPool) *Opening {
	t.Helper()
	o := New(t.Context())
	if err := o.Admit(reg, p.route, registry.Info{Kind: registry.WebSocket}); err != nil {
		t.Fatal(err)
	}
	return o
}

// reach asks the pool's upstreams for an answer to a client's handshake.
func reach(t *testing.T, o *Opening, p *testPool) *Answer {
	t.Helper()
	q, err := handshake.NewRequest(clientRequest(t), handshake.Client{ID: o.ID()}, deflate.Negotiation{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := o.Reach(p.Redial(q, nil, pool.Opening, ""), q)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// clientRequest is a client's handshake.
func clientRequest(t *testing.T) *http.Request {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET /chat?x=1 HTTP/1.1\r\nHost: example.com\r\nCookie: a=1\r\n" +
		"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" +
		"Sec-WebSocket-Protocol: one, two\r\n\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// accepting is a backend that accepts, with some lines more.
func accepting(lines ...string) *backend {
	return &backend{status: http.StatusSwitchingProtocols, lines: lines}
}

// eventually polls until cond holds, and reports whether it did.
func eventually(cond func() bool) bool {
	for until := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			return false
		}
	}
	return true
}
