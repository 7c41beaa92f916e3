package holdfast

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
	"github.com/holdfast-proxy/caddy-holdfast/internal/subdirective"
	"github.com/holdfast-proxy/caddy-holdfast/internal/transport"
)

// Defaults of load balancing and passive health checks.
const (
	defaultTryInterval = 250 * time.Millisecond
	defaultMaxFails    = 1
)

// Upstream is a backend.
type Upstream struct {
	// The address: `host:port`, `:port` of this machine, or `unix//path`; of a WebSocket
	// backend also `host` (port 80, or 443 for wss and https), or a URL of the scheme
	// `ws`, `wss`, `http` or `https` without a path. There may be placeholders in it.
	Dial string `json:"dial,omitempty"`
}

// LoadBalancing says how an upstream is chosen.
type LoadBalancing struct {
	// The selection policy, a module. It is told how many connections of this route
	// each upstream has.
	// Default: `least_conn`.
	SelectionPolicyRaw json.RawMessage `json:"selection_policy,omitempty" caddy:"namespace=http.reverse_proxy.selection_policies inline_key=policy"`

	// How many more upstreams are tried if the first one fails; those that failed
	// again, when there are no others.
	// Default: every available upstream is tried once.
	Retries *int `json:"retries,omitempty"`

	// How long a client waits for an upstream if none is available, or all have
	// failed. Zero: not at all.
	// Default: `0`.
	TryDuration *caddy.Duration `json:"try_duration,omitempty"`

	// How long to pause meanwhile before the upstreams are tried again. It must be
	// positive.
	// Default: `250ms`.
	TryInterval *caddy.Duration `json:"try_interval,omitempty"`
}

// HealthChecks say which upstreams are fit for connections.
type HealthChecks struct {
	// Probes. Unset: none.
	Active *health.Active `json:"active,omitempty"`

	// What is learned from the connections themselves. Unset: nothing.
	Passive *PassiveHealthChecks `json:"passive,omitempty"`

	// Whether live connections leave an upstream that has become unhealthy, spread
	// over the drain window, as long as there is another one for them.
	// Default: `false`.
	Migrate bool `json:"migrate_on_unhealthy,omitempty"`
}

// PassiveHealthChecks say when an upstream's failures make it unhealthy: dials and
// handshakes that fail, and backends that go away from live connections. Clients
// that are held go to such an upstream all the same if there is no other: they have
// pauses of their own.
type PassiveHealthChecks struct {
	Failures

	// A connect with its handshake that takes so long is a failure. Zero: none is.
	// Default: `0`.
	UnhealthyLatency *caddy.Duration `json:"unhealthy_latency,omitempty"`
}

// Failures say how many of them make an upstream unhealthy.
type Failures struct {
	// How long a failure counts. Zero: failures are not counted.
	// Default: `0`.
	FailDuration *caddy.Duration `json:"fail_duration,omitempty"`

	// So many failures that count make an upstream unhealthy. At least 1.
	// Default: `1`.
	MaxFails *int `json:"max_fails,omitempty"`
}

// poolSettings is what a handler says about its upstreams.
type poolSettings struct {
	upstreams      []*Upstream
	dynamic        json.RawMessage
	source         reverseproxy.UpstreamSource // loaded from dynamic; nil: none
	balancing      *LoadBalancing
	active         activeChecks // nil: none
	passive        PassiveHealthChecks
	leaveUnhealthy bool          // live connections leave unhealthy upstreams
	dialTimeout    time.Duration // of one connect
	tls            *reverseproxy.TLSConfig
	proxyProtocol  string
	maxConnections *int // of each upstream
	parse          func(address string) (pool.Address, error)
}

// activeChecks are the active health checks of either handler.
type activeChecks interface {
	Check() error
	Compile() (health.Probe, error)
	Spec() health.Spec
	Checked() any
}

// check refuses settings that mean nothing; the error names the subdirective.
func (s *poolSettings) check() error {
	if len(s.upstreams) == 0 && len(s.dynamic) == 0 {
		return fmt.Errorf("no upstreams")
	}
	if err := checkSource(s.dynamic); err != nil {
		return fmt.Errorf("dynamic: %w", err)
	}
	seen := make(map[string]bool)
	for _, u := range s.upstreams {
		a, err := s.parse(settings.ValueOr(u, Upstream{}).Dial) // a null in JSON
		if err != nil {
			return err
		}
		if key := a.Network() + " " + a.Dial(); !a.Varies() {
			if seen[key] {
				return fmt.Errorf("upstream %q: repeated", u.Dial)
			}
			seen[key] = true
		} else if seen[u.Dial] {
			return fmt.Errorf("upstream %q: repeated", u.Dial)
		}
		seen[u.Dial] = true
	}
	b, p := settings.ValueOr(s.balancing, LoadBalancing{}), s.passive
	if err := transport.Check(s.tls, s.proxyProtocol); err != nil {
		return err
	}
	if s.active != nil {
		if err := s.active.Check(); err != nil {
			return err
		}
	}
	err := settings.First(
		settings.CheckCount("lb_retries", b.Retries, 0),
		settings.NotNegative("lb_try_duration", b.TryDuration), settings.Positive("lb_try_interval", b.TryInterval),
		settings.NotNegative("fail_duration", p.FailDuration), settings.CheckCount("max_fails", p.MaxFails, 1),
		settings.NotNegative("unhealthy_latency", p.UnhealthyLatency),
		settings.CheckCount("upstream_max_connections", s.maxConnections, 0),
	)
	if err != nil {
		return err
	}
	// What would have no effect is a mistake.
	switch counts := p.FailDuration != nil && *p.FailDuration > 0; {
	case !counts && p.MaxFails != nil:
		return fmt.Errorf("max_fails needs a fail_duration")
	case !counts && p.UnhealthyLatency != nil && *p.UnhealthyLatency > 0:
		return fmt.Errorf("unhealthy_latency needs a fail_duration")
	}
	return nil
}

// checkSource refuses a source that could never find an upstream, or that has a
// time which means nothing: Caddy's own take them silently. What other modules
// take is up to them.
func checkSource(raw json.RawMessage) error {
	if len(raw) == 0 {
		return nil
	}
	var source struct {
		Source      string            `json:"source"`
		Name        string            `json:"name"`
		Refresh     *caddy.Duration   `json:"refresh"`
		DialTimeout *caddy.Duration   `json:"dial_timeout"`
		GracePeriod *caddy.Duration   `json:"grace_period"`
		Sources     []json.RawMessage `json:"sources"`
	}
	if err := json.Unmarshal(raw, &source); err != nil {
		return nil // loading the module says it better
	}
	switch source.Source {
	case "a", "srv":
		if source.Name == "" {
			return fmt.Errorf("%q needs a name", source.Source)
		}
		return settings.First(
			settings.NotNegative("refresh", source.Refresh), settings.NotNegative("dial_timeout", source.DialTimeout),
			settings.NotNegative("grace_period", source.GracePeriod),
		)
	case "multi":
		if len(source.Sources) == 0 {
			return fmt.Errorf("%q needs at least one source", source.Source)
		}
		for _, raw := range source.Sources {
			if err := checkSource(raw); err != nil {
				return err
			}
		}
	}
	return nil
}

// provision makes the pool. left is called when live connections of a route may
// have to leave an upstream.
func (s *poolSettings) provision(ctx caddy.Context, left func(*registry.Route)) (*pool.Pool, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	b, p := settings.ValueOr(s.balancing, LoadBalancing{}), s.passive
	logger := ctx.Logger()
	if !selection.CanShowState() {
		logger.Warn("this version of Caddy hides how upstreams are counted; policies other than least_conn and random_choose count no connections")
	}
	policy, err := selection.Load(ctx, b.SelectionPolicyRaw)
	if err != nil {
		return nil, err
	}
	connect, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	events, err := ctx.App("events")
	if err != nil {
		return nil, fmt.Errorf("getting events app: %w", err)
	}
	app, err := ctx.App("connection_registry")
	if err != nil {
		return nil, err
	}
	running := app.(*ConnectionRegistry).running
	config := pool.Config{
		Dynamic:          s.source,
		Policy:           policy,
		Connect:          connect,
		Logger:           logger,
		MaxConnections:   settings.ValueOr(s.maxConnections, 0),
		FailDuration:     settings.DurationOr(p.FailDuration, 0),
		MaxFails:         settings.ValueOr(p.MaxFails, defaultMaxFails),
		UnhealthyLatency: settings.DurationOr(p.UnhealthyLatency, 0),
		LeaveUnhealthy:   s.leaveUnhealthy,
		Retries:          b.Retries,
		TryDuration:      settings.DurationOr(b.TryDuration, 0),
		TryInterval:      settings.DurationOr(b.TryInterval, defaultTryInterval),
		Left:             left,
		Changed: func(upstream string, healthy bool) {
			name := "unhealthy"
			if healthy {
				name = "healthy"
			}
			// Checks begin before the events app has started, which has no lock for what
			// its start changes.
			select {
			case <-running:
				events.(*caddyevents.App).Emit(ctx, name, map[string]any{"host": upstream})
			case <-ctx.Done():
			}
		},
	}
	for _, u := range s.upstreams {
		a, err := s.parse(u.Dial)
		if err != nil {
			return nil, err
		}
		config.Upstreams = append(config.Upstreams, a)
	}
	if s.active != nil {
		if config.Checks, err = s.sharedChecks(logger); err != nil {
			return nil, err
		}
	}
	return pool.New(config), nil
}

// sharedChecks are shared by all configs that have the same ones: of the same
// upstream, with the same connection settings.
func (s *poolSettings) sharedChecks(logger *zap.Logger) (*pool.Checks, error) {
	probe, err := s.active.Compile()
	if err != nil {
		return nil, err
	}
	key, err := json.Marshal([]any{s.active.Checked(), s.tls, s.proxyProtocol}) // not how often
	if err != nil {
		return nil, err
	}
	spec := s.active.Spec()
	spec.Logger = logger
	return &pool.Checks{Checkers: live.checkers, Key: string(key), Spec: spec, Probe: probe}, nil
}

// connect returns how the pool's upstreams are dialed.
func (s *poolSettings) connect(ctx caddy.Context) (pool.Connect, error) {
	d, err := transport.New(ctx, s.dialTimeout, s.tls, s.proxyProtocol)
	if err != nil {
		return nil, err
	}
	secure := s.tls != nil
	for _, u := range s.upstreams {
		if a, err := s.parse(u.Dial); err == nil && a.Plain && secure {
			return nil, fmt.Errorf("upstream %q: its scheme is without TLS, but there are TLS settings", u.Dial)
		}
	}
	return func(ctx context.Context, to pool.Address, port string, client *pool.Client) (net.Conn, error) {
		to = to.WithPort(port)
		return d.Dial(ctx, transport.Request{
			Network: to.Network(), Address: to.Dial(), TLS: to.Secure || secure && !to.Plain,
			Client: client.Addr, TLVs: client.TLVs, Replace: client.Replace,
		})
	}, nil
}

// poolWords are the subdirectives of one argument that are about pools.
func poolWords(b *LoadBalancing, s *health.Schedule, f *Failures) map[string]subdirective.Argument {
	return map[string]subdirective.Argument{
		"lb_retries":      subdirective.Number{To: &b.Retries},
		"lb_try_duration": subdirective.Duration{To: &b.TryDuration},
		"lb_try_interval": subdirective.Duration{To: &b.TryInterval},
		"health_interval": subdirective.Duration{To: &s.Interval},
		"health_timeout":  subdirective.Duration{To: &s.Timeout},
		"health_fails":    subdirective.Number{To: &s.Fails},
		"health_passes":   subdirective.Number{To: &s.Passes},
		"fail_duration":   subdirective.Duration{To: &f.FailDuration},
		"max_fails":       subdirective.Number{To: &f.MaxFails},
	}
}

// parseTo takes upstreams, at least one.
func parseTo(d *caddyfile.Dispenser, to *[]*Upstream, parse func(string) (pool.Address, error)) error {
	if d.CountRemainingArgs() == 0 {
		return d.Errf("%s: missing argument", d.Val())
	}
	return addUpstreams(d, to, parse)
}

// addUpstreams takes the upstreams that are left on the line.
func addUpstreams(d *caddyfile.Dispenser, to *[]*Upstream, parse func(string) (pool.Address, error)) error {
	for _, addr := range d.RemainingArgs() {
		if _, err := parse(addr); err != nil {
			return d.WrapErr(err)
		}
		*to = append(*to, &Upstream{Dial: addr})
	}
	return nil
}
