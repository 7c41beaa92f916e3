package holdfast

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/opening"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// Upstream is a backend.
type Upstream struct {
	// The address: `host:port`, `host` (port 80), `unix//path`, or a URL of the
	// scheme `ws` or `http` without a path.
	Dial string `json:"dial,omitempty"`
}

// LoadBalancing says how an upstream is chosen.
type LoadBalancing struct {
	// The selection policy: `least_conn`, which counts the live connections of
	// this route, or `round_robin`, which is Caddy's.
	// Default: `least_conn`.
	SelectionPolicyRaw json.RawMessage `json:"selection_policy,omitempty" caddy:"namespace=http.reverse_proxy.selection_policies inline_key=policy"`
}

// pool is the set of upstreams of one handler, and how one of them is chosen
// and dialed. Connections are counted by the registry, under the upstream's
// name, so that counts go on across reloads.
type pool struct {
	upstreams   []*upstream
	policy      policy
	dialTimeout time.Duration
}

// upstream is one backend as configured. It is immutable.
type upstream struct {
	name    string // as configured
	network string
	address string
}

// policy chooses among candidates, of which there is at least one. conns is the
// number of live connections of an upstream. It must not block.
type policy interface {
	choose(candidates []*upstream, conns func(name string) int, r *http.Request, w http.ResponseWriter) *upstream
}

// newPool makes the pool of a handler's settings.
func newPool(ctx caddy.Context, upstreams []*Upstream, lb *LoadBalancing, dialTimeout time.Duration) (*pool, error) {
	p := &pool{dialTimeout: dialTimeout}
	seen := make(map[string]bool)
	for _, u := range upstreams {
		up, err := parseUpstream(u.Dial)
		if err != nil {
			return nil, err
		}
		if seen[up.address] {
			return nil, fmt.Errorf("upstream %q: repeated", u.Dial)
		}
		seen[up.address] = true
		p.upstreams = append(p.upstreams, up)
	}
	if len(p.upstreams) == 0 {
		return nil, fmt.Errorf("no upstreams")
	}
	var err error
	p.policy, err = loadPolicy(ctx, lb, p.upstreams)
	return p, err
}

// has reports whether an upstream of that name is in the pool.
func (p *pool) has(name string) bool {
	return slices.ContainsFunc(p.upstreams, func(u *upstream) bool { return u.name == name })
}

// without returns the upstreams but for the one of that name.
func (p *pool) without(name string) []*upstream {
	return slices.DeleteFunc(slices.Clone(p.upstreams), func(u *upstream) bool { return u.name == name })
}

// each returns a function that chooses the upstreams for one request, each once,
// and takes a place in the count of the one it chose. Those of each group are
// chosen before the next group's.
func (p *pool) each(route *registry.Route, r *http.Request, w http.ResponseWriter, groups ...[]*upstream) func() *opening.Target {
	var candidates []*upstream
	return func() *opening.Target {
		for len(candidates) == 0 && len(groups) > 0 {
			candidates, groups = groups[0], groups[1:]
		}
		var chosen *upstream
		place := route.Choose(func(conns func(string) int) string {
			if len(candidates) > 0 {
				chosen = p.policy.choose(candidates, conns, r, w)
			}
			if chosen == nil {
				return ""
			}
			return chosen.name
		})
		if place == nil {
			return nil
		}
		candidates = slices.DeleteFunc(slices.Clone(candidates), func(u *upstream) bool { return u == chosen })
		return &opening.Target{
			Place: place, Address: chosen.address,
			Dial: func(ctx context.Context) (net.Conn, error) { return p.dial(ctx, chosen) },
		}
	}
}

// dial connects to an upstream.
func (p *pool) dial(ctx context.Context, u *upstream) (net.Conn, error) {
	d := net.Dialer{Timeout: p.dialTimeout}
	return d.DialContext(ctx, u.network, u.address)
}

// leastConn chooses an upstream that has the fewest connections, at random
// among equals.
type leastConn struct{}

func (leastConn) choose(candidates []*upstream, conns func(string) int, _ *http.Request, _ http.ResponseWriter) *upstream {
	var best *upstream
	fewest, equals := 0, 0
	for _, u := range candidates {
		n := conns(u.name)
		switch {
		case best == nil || n < fewest:
			best, fewest, equals = u, n, 1
		case n == fewest:
			equals++
			if rand.IntN(equals) == 0 { //nolint:gosec // spreading load needs no secrets
				best = u
			}
		}
	}
	return best
}

// caddyPolicy is a selection policy of Caddy.
type caddyPolicy struct {
	selector reverseproxy.Selector
	theirs   map[*upstream]*reverseproxy.Upstream
}

func (c *caddyPolicy) choose(candidates []*upstream, _ func(string) int, r *http.Request, w http.ResponseWriter) *upstream {
	theirs := make(reverseproxy.UpstreamPool, len(candidates))
	for i, u := range candidates {
		theirs[i] = c.theirs[u]
	}
	chosen := c.selector.Select(theirs, r, w)
	for i, t := range theirs {
		if t == chosen {
			return candidates[i]
		}
	}
	return nil
}

// loadPolicy loads the selection policy, least_conn if none is set.
func loadPolicy(ctx caddy.Context, lb *LoadBalancing, upstreams []*upstream) (policy, error) {
	if lb == nil || len(lb.SelectionPolicyRaw) == 0 {
		return leastConn{}, nil
	}
	var named struct {
		Policy string `json:"policy"`
	}
	if err := json.Unmarshal(lb.SelectionPolicyRaw, &named); err != nil {
		return nil, fmt.Errorf("reading selection policy: %w", err)
	}
	switch named.Policy {
	case "least_conn":
		// Caddy's own counts reverse_proxy's requests and cannot be told of ours.
		return leastConn{}, nil
	case "round_robin":
	default:
		return nil, errPolicy(named.Policy)
	}
	mod, err := ctx.LoadModule(lb, "SelectionPolicyRaw")
	if err != nil {
		return nil, fmt.Errorf("loading selection policy %q: %w", named.Policy, err)
	}
	p := &caddyPolicy{selector: mod.(reverseproxy.Selector), theirs: make(map[*upstream]*reverseproxy.Upstream)}
	for _, u := range upstreams {
		p.theirs[u] = &reverseproxy.Upstream{Dial: u.address, Host: new(reverseproxy.Host)}
	}
	return p, nil
}

func errPolicy(name string) error {
	return fmt.Errorf("unknown lb_policy %q: want least_conn or round_robin", name)
}

// parseUpstream reads an upstream's address. There is no path in it: the
// client's goes to the backend, and rewrite and uri change it.
func parseUpstream(addr string) (*upstream, error) {
	fail := func(format string, args ...any) (*upstream, error) {
		return nil, fmt.Errorf("upstream %q: %s", addr, fmt.Sprintf(format, args...))
	}
	if addr == "" {
		return fail("empty address")
	}
	if strings.Contains(addr, "{") {
		return fail("placeholders are not supported")
	}
	hostport := addr
	if strings.Contains(addr, "://") {
		u, err := url.Parse(addr)
		if err != nil {
			return fail("%v", err)
		}
		if u.Scheme != "ws" && u.Scheme != "http" {
			return fail("unsupported scheme %q: want ws or http", u.Scheme)
		}
		if u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
			return fail("only scheme, host and port are allowed; use the rewrite or uri directive to change the path")
		}
		hostport = u.Host
	}
	na, err := caddy.ParseNetworkAddressWithDefaults(hostport, "tcp", 80)
	switch {
	case err != nil:
		return fail("%v", err)
	case na.PortRangeSize() != 1:
		return fail("want one port")
	case na.IsUnixNetwork():
		return &upstream{name: addr, network: na.Network, address: na.Host}, nil
	case na.Network != "tcp" && na.Network != "tcp4" && na.Network != "tcp6":
		return fail("unsupported network %q: want tcp or unix", na.Network)
	case na.Host == "":
		return fail("no host")
	case na.StartPort == 0:
		return fail("port 0")
	}
	return &upstream{name: addr, network: na.Network, address: na.JoinHostPort(0)}, nil
}
