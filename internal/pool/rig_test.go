// This file has what the tests of pools share: a pool whose backends, dynamic source
// and clients follow a script.

package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
)

// rig is a pool with a route of its own.
type rig struct {
	t     *testing.T
	reg   *registry.Registry
	route *registry.Route
	net   *network
	pool  *Pool

	mu      sync.Mutex
	left    int      // calls of Left
	changes []string // calls of Changed
}

// option changes a pool's config before the pool is made.
type option func(r *rig, c *Config)

// newRig has a pool that has started, with these upstreams, of which the first one
// available is chosen.
func newRig(t *testing.T, upstreams []string, options ...option) *rig {
	t.Helper()
	reg := registry.New()
	return newRigOn(t, reg, reg.Retain(registry.WebSocket, "route"), new(network), upstreams, options...)
}

func newRigOn(t *testing.T, reg *registry.Registry, route *registry.Route, n *network, upstreams []string, options ...option) *rig {
	t.Helper()
	r := &rig{t: t, reg: reg, route: route, net: n}
	c := Config{
		Policy:      load(t, `{"policy":"first"}`),
		Connect:     n.connect,
		Logger:      zap.NewNop(),
		TryInterval: 250 * time.Millisecond,
		Left: func(route *registry.Route) {
			if route != r.route {
				t.Errorf("Left: got route %p, want %p", route, r.route)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.left++
		},
		Changed: func(upstream string, healthy bool) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.changes = append(r.changes, fmt.Sprint(upstream, " ", healthy))
		},
	}
	for _, name := range upstreams {
		a, err := ParseAddress(name)
		if err != nil {
			t.Fatal(err)
		}
		c.Upstreams = append(c.Upstreams, a)
	}
	for _, o := range options {
		o(r, &c)
	}
	r.pool = New(c)
	r.pool.Start(r.route)
	t.Cleanup(r.pool.Stop)
	return r
}

// load loads a selection policy.
func load(t *testing.T, raw string) *selection.Policy {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	p, err := selection.Load(ctx, json.RawMessage(raw))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// policy chooses by another policy than first.
func policy(raw string) option {
	return func(r *rig, c *Config) { c.Policy = load(r.t, raw) }
}

// fails counts failures.
func fails(most int, lasting time.Duration) option {
	return func(_ *rig, c *Config) { c.MaxFails, c.FailDuration = most, lasting }
}

// leaves has live connections leave unhealthy upstreams.
func leaves(_ *rig, c *Config) { c.LeaveUnhealthy = true }

// full limits each upstream's connections.
func full(n int) option { return func(_ *rig, c *Config) { c.MaxConnections = n } }

// retries sets lb_retries.
func retries(n int) option { return func(_ *rig, c *Config) { c.Retries = &n } }

// waits sets lb_try_duration.
func waits(d time.Duration) option { return func(_ *rig, c *Config) { c.TryDuration = d } }

// asks has the pool ask a dynamic source.
func asks(s *source) option { return func(_ *rig, c *Config) { c.Dynamic = s } }

// checked has the upstreams probed every minute, by connecting.
func checked(c *health.Checkers) option {
	return func(r *rig, config *Config) {
		config.Checks = &Checks{
			Checkers: c, Key: "check", Probe: r.net.probe,
			Spec: health.Spec{Interval: time.Minute, Timeout: 3 * time.Second, Fails: 1, Passes: 1, Logger: zap.NewNop()},
		}
	}
}

// client is one that comes through Caddy.
func client() Client {
	return Client{
		Request: selection.Prepare(httptest.NewRequest(http.MethodGet, "/chat", nil), "192.0.2.1", false),
		Addr:    netip.MustParseAddrPort("192.0.2.1:1234"),
		Replace: func(s string) string { return s },
	}
}

// open begins a way through the pool for a new connection.
func (r *rig) open() *Tries { return r.pool.Tries(r.route, client(), Opening, "") }

// resume begins a way through the pool for a connection that has lost an upstream.
func (r *rig) resume(last string) *Tries { return r.pool.Tries(r.route, client(), Resuming, last) }

// move begins a way through the pool for a connection that leaves an upstream.
func (r *rig) move(last string) *Tries { return r.pool.Tries(r.route, client(), Moving, last) }

// all returns the keys of the upstreams that a way leads to, whose dials all fail:
// the places are given back.
func (r *rig) all(tries *Tries) []string {
	r.t.Helper()
	keys := []string{}
	for target := tries.Next(r.t.Context()); target != nil; target = tries.Next(r.t.Context()) {
		keys = append(keys, target.Place.Key())
		r.route.Leave(target.Place)
		if len(keys) > 100 {
			r.t.Fatal("got 100 tries and no end")
		}
	}
	return keys
}

// want checks the keys of the upstreams that a way leads to.
func (r *rig) want(tries *Tries, keys ...string) {
	r.t.Helper()
	if got := r.all(tries); !slices.Equal(got, keys) {
		r.t.Errorf("got upstreams %q, want %q", got, keys)
	}
}

// connect opens a connection that stays, and returns its place.
func (r *rig) connect() *registry.Upstream {
	r.t.Helper()
	target := r.open().Next(r.t.Context())
	if target == nil {
		r.t.Fatal("got no upstream, want one")
	}
	return target.Place
}

// fail has an upstream fail n times.
func (r *rig) fail(name string, n int) {
	r.t.Helper()
	place := r.route.Choose(func(func(string) registry.Load) string { return name })
	defer r.route.Leave(place)
	for range n {
		r.pool.Failed(r.route, place)
	}
}

// drain begins or ends the drain of an upstream.
func (r *rig) drain(name string, drain bool) { r.reg.Drain(name, "", drain) }

// conns returns how many places at an upstream are taken.
func (r *rig) conns(key string) (n int) {
	r.route.Loads(func(load func(string) registry.Load) { n = load(key).Conns })
	return n
}

// lefts returns how often Left was called.
func (r *rig) lefts() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left
}

// changed returns what Changed was told since the last call.
func (r *rig) changed() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer func() { r.changes = nil }()
	return r.changes
}

// pass lets time pass, and whatever happens in it happen.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// elapsed checks how long f takes, in the time of synctest.
func elapsed(t *testing.T, want time.Duration, f func()) {
	t.Helper()
	began := time.Now()
	f()
	if got := time.Since(began); got != want {
		t.Errorf("got %v waited, want %v", got, want)
	}
}

var errDown = errors.New("connection refused")

// network is where upstreams are reached, all of which are up at first.
type network struct {
	mu      sync.Mutex
	down    map[string]bool // by what was dialed
	hanging bool            // dials that wait until they are given up
	dials   []dial
	targets []health.Target
}

// dial is a connect as the network saw it.
type dial struct {
	to     Address
	port   string
	client netip.AddrPort
}

// connect is a Connect.
func (n *network) connect(ctx context.Context, to Address, port string, client *Client) (net.Conn, error) {
	n.mu.Lock()
	n.dials = append(n.dials, dial{to, port, client.Addr})
	down, hanging := n.down[to.Dial()], n.hanging
	n.mu.Unlock()
	switch {
	case hanging:
		<-ctx.Done()
		return nil, ctx.Err()
	case down:
		return nil, errDown
	default:
		return struct{ net.Conn }{}, nil // nobody uses it
	}
}

// probe connects to the target.
func (n *network) probe(ctx context.Context, t health.Target) error {
	n.mu.Lock()
	n.targets = append(n.targets, t)
	n.mu.Unlock()
	_, err := t.Dial(ctx, "")
	return err
}

// set takes what is reached at an address down, or brings it up.
func (n *network) set(address string, down bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.down == nil {
		n.down = make(map[string]bool)
	}
	n.down[address] = down
}

// dialed returns the dials since the last call.
func (n *network) dialed() []dial {
	n.mu.Lock()
	defer n.mu.Unlock()
	defer func() { n.dials = nil }()
	return n.dials
}

// source is a dynamic source that answers by a script.
type source struct {
	mu       sync.Mutex
	names    []string
	err      error
	hanging  bool                     // the question is given up before there is an answer …
	stubborn bool                     // … which comes even so
	requests map[string]*http.Request // the last ones, by path
}

// GetUpstreams implements reverseproxy.UpstreamSource.
func (s *source) GetUpstreams(r *http.Request) ([]*reverseproxy.Upstream, error) {
	s.mu.Lock()
	if s.requests == nil {
		s.requests = make(map[string]*http.Request)
	}
	s.requests[r.URL.Path] = r
	names, err, hanging, stubborn := s.names, s.err, s.hanging, s.stubborn
	s.mu.Unlock()
	if hanging {
		<-r.Context().Done()
		if !stubborn {
			return nil, r.Context().Err()
		}
	}
	if err != nil {
		return nil, err
	}
	ups := make([]*reverseproxy.Upstream, 0, len(names))
	for _, name := range names {
		ups = append(ups, &reverseproxy.Upstream{Dial: name})
	}
	return ups, nil
}

// says changes the answer.
func (s *source) says(names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names, s.err, s.hanging = names, nil, false
}

// breaks has the source answer with an error.
func (s *source) breaks(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// hangs has the source say nothing until the question is given up.
func (s *source) hangs(stubborn bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hanging, s.stubborn = true, stubborn
}

// request returns the last request for a path.
func (s *source) request(path string) *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[path]
}

// Interface guards
var (
	_ reverseproxy.UpstreamSource = (*source)(nil)
	_ Connect                     = (*network)(nil).connect
)
