package pool

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
)

// Connect dials an address for a client, on port instead of its own unless that is
// "". A client without an address stands for the proxy itself.
type Connect func(ctx context.Context, to Address, port string, client *Client) (net.Conn, error)

// Checks are a pool's active health checks.
type Checks struct {
	Checkers *health.Checkers
	// Key tells these checks from others of the same address.
	Key  string
	Spec health.Spec // without Probe and Upstream
	// Probe checks one upstream.
	Probe func(ctx context.Context, t health.Target) error
}

// Config is what a pool is made of. Zero turns a limit off.
type Config struct {
	Upstreams []Address
	Dynamic   reverseproxy.UpstreamSource // nil: none
	Policy    *selection.Policy
	Connect   Connect
	Checks    *Checks // nil: none
	Logger    *zap.Logger

	MaxConnections int // of each upstream

	// Passive health checks: so many failures within FailDuration make an upstream
	// unhealthy. A handshake that takes UnhealthyLatency is one.
	FailDuration     time.Duration // 0: failures are not counted
	MaxFails         int
	UnhealthyLatency time.Duration
	LeaveUnhealthy   bool // live connections leave unhealthy upstreams

	Retries     *int // attempts after the first one; nil: every available upstream once
	TryDuration time.Duration
	TryInterval time.Duration

	// Left is called when live connections of the route may have to leave an
	// upstream; Changed when an active health check has changed its mind, one call
	// after the other, perhaps still after Stop. Neither with locks held.
	Left    func(route *registry.Route)
	Changed func(upstream string, healthy bool)
}

// Pool is the upstreams of one config's route. Start begins, and Stop ends, what
// goes on in the background. Locks are taken in this order: mu, Registry.mu, those
// of health checks. None is held while anything is called that may block.
type Pool struct {
	Config

	route   *registry.Route // set by Start
	static  []*upstream
	stop    context.CancelFunc
	kicked  chan struct{} // holds one: that is enough to look
	changes changes
	failing atomic.Bool // an upstream has failed too often, and connections are to leave it

	// answer is what the dynamic source said last, nil before it has. It is
	// changed by follow only.
	answer    atomic.Pointer[answer]
	askFailed bool // the last question had no answer; only follow uses it

	mu      sync.Mutex
	running bool
	// handed are the keys of upstreams that connections were given and the last
	// answer has not: new ones, and those that the source has for some requests only.
	handed map[string]bool
}

// upstream is one backend. Only adopt changes it.
type upstream struct {
	key    string // in the registry
	addr   Address
	err    error // what is wrong with an address that placeholders made
	policy *selection.Upstream
	watch  atomic.Pointer[health.Watch] // nil: not checked
	fresh  bool                         // the source named it to a client, and not in its last answer
}

// New returns a pool that is not started. Its upstreams' names are distinct.
func New(c Config) *Pool {
	p := &Pool{Config: c, kicked: make(chan struct{}, 1), handed: make(map[string]bool)}
	for _, a := range c.Upstreams {
		p.static = append(p.static, newUpstream(a.Name, a))
	}
	return p
}

func newUpstream(key string, a Address) *upstream {
	return &upstream{key: key, addr: a, policy: selection.NewUpstream(cmp.Or(a.Dial(), a.Name))}
}

// Start begins health checks and the watch over a dynamic source. It does not block.
// A pool is started once; whatever asks for its upstreams may do so before.
func (p *Pool) Start(route *registry.Route) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop != nil {
		return
	}
	p.running, p.route = true, route
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	for _, u := range p.static {
		p.adopt(u)
	}
	if p.Dynamic != nil || p.Checks != nil || p.LeaveUnhealthy {
		go p.follow(ctx)
	}
}

// Stop ends what Start began.
func (p *Pool) Stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running {
		return
	}
	p.running = false
	p.stop()
	for _, u := range p.all() {
		p.drop(u)
	}
}

// adopt begins to look after an upstream. mu is held, and nobody else has it yet.
func (p *Pool) adopt(u *upstream) {
	if u.addr.Varies() {
		return // each of its addresses is known while it is in use
	}
	p.route.Declare(u.key)
	if p.Checks != nil {
		u.watch.Store(p.check(u))
	}
}

// drop ends what adopt began. mu is held.
func (p *Pool) drop(u *upstream) {
	if u.addr.Varies() {
		return
	}
	p.route.Forget(u.key)
	if w := u.watch.Load(); w != nil {
		w.Stop()
	}
}

// check begins the active health checks of an upstream.
func (p *Pool) check(u *upstream) *health.Watch {
	c := p.Checks
	spec := c.Spec
	spec.Upstream = u.addr.Name
	target := health.Target{
		Dial: func(ctx context.Context, port string) (net.Conn, error) {
			return p.Connect(ctx, u.addr, port, &Client{Replace: withoutRequest})
		},
		Host: u.addr.Dial(),
	}
	spec.Probe = func(ctx context.Context) error { return c.Probe(ctx, target) }
	// The scheme decides about TLS, and so about the outcome.
	key := fmt.Sprintf("%s %s %t %t %s", u.addr.Network(), u.addr.Dial(), u.addr.Secure, u.addr.Plain, c.Key)
	return c.Checkers.Watch(key, spec, func(healthy bool) {
		p.changes.add(change{u.addr.Name, healthy})
		p.kick()
	})
}

// withoutRequest resolves placeholders for the proxy's own connections, as far as
// they need no request: those of a request are empty.
func withoutRequest(s string) string { return caddy.NewReplacer().ReplaceAll(s, "") }

// kick makes follow look whether connections have to leave.
func (p *Pool) kick() {
	select {
	case p.kicked <- struct{}{}:
	default: // it is going to look
	}
}

// healthy reports what active health checks say.
func (u *upstream) healthy() bool {
	w := u.watch.Load()
	return w == nil || w.Healthy()
}

// all returns the upstreams that do not depend on the request.
func (p *Pool) all() []*upstream {
	if a := p.answer.Load(); a != nil {
		return slices.Concat(p.static, a.upstreams)
	}
	return p.static
}

// available reports whether a connection may go to an upstream. Who was there and
// is held may also go to one that failed lately: its own pauses spare the upstream.
func (p *Pool) available(u *upstream, l registry.Load, lenient bool) bool {
	return u.healthy() && !l.Draining &&
		(lenient || !p.failed(l)) &&
		(p.MaxConnections == 0 || l.Conns < p.MaxConnections)
}

// failed reports whether passive health checks speak against an upstream.
func (p *Pool) failed(l registry.Load) bool { return p.FailDuration > 0 && l.Fails >= p.MaxFails }

// Leaves reports whether live connections are to leave the upstream with a key. If
// it is not one of this pool's, that is for the caller to decide, by Has.
func (p *Pool) Leaves(route *registry.Route, key string) (leaves bool) {
	route.Loads(func(load func(string) registry.Load) {
		l := load(key)
		leaves = l.Draining || p.LeaveUnhealthy && p.failed(l)
	})
	if leaves || !p.LeaveUnhealthy {
		return leaves
	}
	return p.Unhealthy(key)
}

// Unhealthy reports whether active health checks speak against the upstream with a
// key.
func (p *Pool) Unhealthy(key string) bool {
	return slices.ContainsFunc(p.all(), func(u *upstream) bool { return u.key == key && !u.healthy() })
}

// Has reports whether the upstream with a key is one of the pool's.
func (p *Pool) Has(key string) bool {
	name := registry.UpstreamName(key)
	if slices.ContainsFunc(p.all(), func(u *upstream) bool { return u.key == name }) {
		return true
	}
	if p.Dynamic == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.handed[key] || p.answer.Load() == nil // nobody knows yet
}

// Others reports whether a connection could go from the upstream with a key to
// another one.
func (p *Pool) Others(route *registry.Route, key string) (others bool) {
	all := p.all()
	route.Loads(func(load func(string) registry.Load) {
		others = slices.ContainsFunc(all, func(u *upstream) bool {
			return u.key != registry.UpstreamName(key) && p.available(u, load(u.key), false)
		})
	})
	return others
}

// Tried notes how a dial went: it failed with err, or how long it took.
func (p *Pool) Tried(route *registry.Route, t *Target, took time.Duration, err error) {
	if err != nil || p.UnhealthyLatency > 0 && took >= p.UnhealthyLatency {
		p.Failed(route, t.Place)
	}
}

// Failed counts a failure of an upstream.
func (p *Pool) Failed(route *registry.Route, up *registry.Upstream) {
	if p.FailDuration <= 0 {
		return
	}
	if n := route.Fail(up, p.FailDuration); n == p.MaxFails {
		p.Logger.Info("upstream failed too often", zap.String("route", route.Name()),
			zap.String("upstream", up.Name()), zap.Int("count", n))
		if p.LeaveUnhealthy {
			p.failing.Store(true)
			p.kick()
		}
	}
}

// Upstreams implements registry.Pool.
func (p *Pool) Upstreams() []registry.UpstreamState {
	all := p.all()
	states := make([]registry.UpstreamState, 0, len(all))
	for _, u := range all {
		s := registry.UpstreamState{Key: u.key, Dial: u.addr.Dial(), Healthy: u.healthy()}
		if p.FailDuration > 0 {
			s.MaxFails = p.MaxFails
		}
		states = append(states, s)
	}
	return states
}
