package holdfast

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/mholt/caddy-l4/layer4"
	// One build of this module is enough: it brings caddy-l4's app, its listener
	// wrapper, and the matchers that passthrough routes are made of.
	_ "github.com/mholt/caddy-l4/modules/l4proxyprotocol"
	_ "github.com/mholt/caddy-l4/modules/l4tls"
	"github.com/pires/go-proxyproto"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/opening"
	"github.com/holdfast-proxy/caddy-holdfast/internal/passthrough"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
	"github.com/holdfast-proxy/caddy-holdfast/internal/tunnel"
)

// caddy-l4's proxy_protocol handler was written for a go-proxyproto whose default
// was to use a PROXY header that is there; since v0.15 the default is to refuse
// connections without one. caddy-l4 names no policy, so the old default is set
// here. Caddy's own listener wrapper always names one and is not concerned.
func init() { proxyproto.DefaultPolicy = proxyproto.USE }

// SNIPassthrough relays connections that caddy-l4 has matched, by their TLS server
// name for one, to a pool of upstreams. The bytes are passed as they come: the proxy
// needs no certificate, and cannot see what is said.
//
// A connection outlives the config that accepted it: a reload that keeps the
// route, which is known by its name, changes no connection.
type SNIPassthrough struct {
	// The name of the route in API, logs and metrics, and across reloads.
	// Handlers that share a name must have equal settings and are one route.
	// Default: the server's first listen address and an ordinal, like `:443#1`.
	Name string `json:"name,omitempty"`

	// The backends. At least one.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// How an upstream is chosen. The policy is one of random, random_choose,
	// least_conn, round_robin, weighted_round_robin, first and ip_hash.
	LoadBalancing *LoadBalancing `json:"load_balancing,omitempty"`

	// Which upstreams are fit for connections.
	HealthChecks *PassthroughHealthChecks `json:"health_checks,omitempty"`

	// How an upstream is connected to.
	Transport *PassthroughTransport `json:"transport,omitempty"`

	// How a dead or unused connection is found and ended.
	KeepAlive *PassthroughKeepAlive `json:"keep_alive,omitempty"`

	// How many connections there may be.
	Limits *PassthroughLimits `json:"limits,omitempty"`

	// Whether there is an access-log entry for each connection, at its end.
	// Default: `false`.
	Log bool `json:"log,omitempty"`

	logger     *zap.Logger
	name       string
	config     *passthroughConfig
	generation *generation
}

// The groups of settings.
type (
	PassthroughTransport = settings.PassthroughTransport
	PassthroughKeepAlive = settings.PassthroughKeepAlive
	PassthroughLimits    = settings.PassthroughLimits
)

// PassthroughHealthChecks say which upstreams are fit for connections.
type PassthroughHealthChecks struct {
	// Probes. Unset: none.
	Active *health.ActiveLayer4 `json:"active,omitempty"`

	// What is learned from connects that fail. Unset: nothing.
	Passive *Failures `json:"passive,omitempty"`

	// Whether live connections of an upstream are closed when active checks find it
	// unhealthy, spread over connection_registry's orphan_timeout, unless it has
	// recovered by then.
	// Default: `false`.
	CloseIfUnhealthy bool `json:"close_if_unhealthy,omitempty"`
}

// CaddyModule returns the module's information.
func (*SNIPassthrough) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.sni_passthrough",
		New: func() caddy.Module { return new(SNIPassthrough) },
	}
}

// Provision sets the handler up and declares its route to the registry.
func (h *SNIPassthrough) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	config, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if err := h.check(); err != nil {
		return err
	}
	l := settings.ValueOr(h.Limits, PassthroughLimits{})
	c := &passthroughConfig{
		routeCommon: routeCommon{
			kind:   registry.Passthrough,
			json:   string(config),
			limits: registry.Limits{Connections: l.MaxConnections, PerIP: l.MaxConnectionsPerIP},
			log:    h.Log,
			logger: h.logger,
		},
	}
	if c.settings, err = h.KeepAlive.Tunnel(); err != nil {
		return err
	}
	s := h.pool()
	c.dialTimeout, c.closeUnhealthy, c.tells = s.dialTimeout, s.leaveUnhealthy, s.proxyProtocol != ""
	if c.pool, err = s.provision(ctx, whenLeft(c)); err != nil {
		return err
	}
	if h.config, h.name, h.generation, err = declare(ctx, passthrough.ListenerOf(ctx), h.Name, c); err != nil {
		return err
	}
	c.orphanTimeout = h.generation.orphanTimeout
	return nil
}

// check refuses settings that mean nothing; the error names the subdirective.
func (h *SNIPassthrough) check() error {
	s := h.pool()
	err := settings.First(
		checkName(h.Name),
		settings.Positive("dial_timeout", settings.ValueOr(h.Transport, PassthroughTransport{}).DialTimeout),
		h.KeepAlive.Check(), h.Limits.Check(),
		selection.CheckLayer4(settings.ValueOr(h.LoadBalancing, LoadBalancing{}).SelectionPolicyRaw),
		s.check(),
	)
	if err == nil && s.leaveUnhealthy && s.active == nil {
		err = errors.New("close_if_unhealthy needs health_tcp or health_tls")
	}
	return err
}

// pool is what the handler says about its upstreams.
func (h *SNIPassthrough) pool() *poolSettings {
	t := settings.ValueOr(h.Transport, PassthroughTransport{})
	c := settings.ValueOr(h.HealthChecks, PassthroughHealthChecks{})
	s := &poolSettings{
		upstreams: h.Upstreams, parse: pool.ParsePlainAddress, balancing: h.LoadBalancing,
		passive: PassiveHealthChecks{Failures: settings.ValueOr(c.Passive, Failures{})}, leaveUnhealthy: c.CloseIfUnhealthy,
		dialTimeout:   settings.DurationOr(t.DialTimeout, settings.PassthroughDialTimeout),
		proxyProtocol: t.ProxyProtocol, maxConnections: settings.ValueOr(h.Limits, PassthroughLimits{}).PerUpstream,
	}
	if c.Active != nil { // a nil in an interface would be something
		s.active = c.Active
	}
	return s
}

// Handle connects the client to an upstream. It returns as soon as the tunnel stands,
// which then runs on its own, or cannot be had; caddy-l4 closes its own descriptor of
// the connection then. What is more than a plain socket cannot be taken from caddy-l4,
// and is served until its end.
func (h *SNIPassthrough) Handle(cx *layer4.Connection, _ layer4.Handler) error {
	route := live.route(h.generation, registry.Passthrough, h.name)
	if route == nil {
		return nil
	}
	client, err := passthrough.NewClient(cx)
	if err != nil {
		h.logger.Debug("client is gone", zap.Error(err))
		return nil
	}
	o := opening.New(context.Background())
	info := registry.Info{Kind: registry.Passthrough, Client: client.IP(), SNI: client.ServerName, Protocol: "tcp"}
	if err := o.Admit(live.registry, route, info); err != nil {
		h.logger.Debug("client is refused", zap.String("route", h.name), zap.String("remote", info.Client), zap.Error(err))
		return nil
	}
	backend, err := o.Connect(h.config.opening(route, client, cx.Replacer()), cx)
	if err != nil {
		switch {
		case errors.Is(err, opening.ErrNoUpstream):
			route.Refused("no_upstream")
		case !errors.Is(err, opening.ErrEnded):
			route.Refused("dial")
		}
		h.logger.Debug("client could not be connected", zap.String("id", o.ID()), zap.Error(err))
		o.Fail(registry.Dial) // unless there is another reason
		o.Close()
		return nil
	}
	conn, early, detached := client.Detach()
	tunnels := liveTunnels{route}
	t := o.Tunnel(tunnels, conn, backend, early)
	if t == nil {
		_ = conn.Close()
		o.Close()
		return nil
	}
	tunnels.stay(o.Record())
	if detached {
		go t.Run()
	} else {
		t.Run()
	}
	return nil
}

// passthroughConfig is what a config says about a route of tunnels.
type passthroughConfig struct {
	routeCommon
	settings       *tunnel.Settings
	dialTimeout    time.Duration
	orphanTimeout  time.Duration
	closeUnhealthy bool
	tells          bool // upstreams are told who the client is
}

// opening returns how to reach the route's upstreams.
func (c *passthroughConfig) opening(route *registry.Route, client *passthrough.Client, repl *caddy.Replacer) opening.Config {
	who := pool.Client{Addr: client.Addr, Replace: func(s string) string { return repl.ReplaceAll(s, "") }}
	if c.tells {
		who.TLVs = client.TLVs()
	}
	// What the seven policies, which are HTTP's, know of a client.
	who.Request = selection.Prepare(&http.Request{
		Method: http.MethodGet, URL: new(url.URL), Host: client.ServerName, RemoteAddr: client.Addr.String(),
	}, client.IP(), false)
	return opening.Config{
		Next:        c.pool.Tries(route, who, pool.Opening, "").Next,
		Tried:       func(t *pool.Target, took time.Duration, err error) { c.pool.Tried(route, t, took, err) },
		DialTimeout: c.dialTimeout,
		Logger:      c.logger,
	}
}

// leave ends connections: they cannot move. Those of a drained upstream run on.
func (c *passthroughConfig) leave(route *registry.Route) int {
	n := live.registry.EndLeaving(route, c.leaves, c.orphanTimeout)
	if n > 0 {
		c.logger.Info("closing connections of upstreams that are gone or unhealthy",
			zap.String("route", route.Name()), zap.Int("count", n), zap.Duration("duration", c.orphanTimeout))
	}
	return 0
}

// leaves is why connections may not stay at the upstream with a key; "": they may.
// They stay at one that is being drained.
func (c *passthroughConfig) leaves(upstream string) registry.Reason {
	switch {
	case c.alone.Load() && !c.pool.Has(upstream):
		return registry.Orphan
	case c.closeUnhealthy && c.pool.Unhealthy(upstream):
		return registry.Unhealthy
	default:
		return ""
	}
}

func (c *passthroughConfig) stays(upstream string) bool {
	return c.pool.Has(upstream) && c.leaves(upstream) == ""
}

// liveTunnels is a route as its live tunnels see it: by the newest config.
type liveTunnels struct{ route *registry.Route }

func (r liveTunnels) config() *passthroughConfig { return r.route.Settings.Load().(*passthroughConfig) }

// Settings implements tunnel.Route.
func (r liveTunnels) Settings() *tunnel.Settings { return r.config().settings }

// Inactive implements tunnel.Route.
func (r liveTunnels) Inactive(rec *registry.Conn, idle time.Duration) {
	r.route.IdleWarned()
	c, v := r.config(), rec.View()
	c.logger.Warn("connection is inactive and about to be closed",
		zap.String("id", v.ID), zap.String("route", v.Route), zap.String("remote", v.Client), zap.String("upstream", v.Upstream),
		zap.Duration("idle", idle), zap.Duration("duration", c.settings.InactivityGrace))
}

// stay plans the end of a new connection whose upstream has to be left: it may have
// been on its way there when the others were told.
func (r liveTunnels) stay(rec *registry.Conn) {
	c := r.config()
	if why := c.leaves(rec.Upstream()); why != "" {
		if at, _ := rec.PlannedEnd(); at.IsZero() {
			rec.CloseAt(time.Now().Add(c.orphanTimeout), registry.Ending{Reason: why})
		}
	}
}

// Interface guards
var (
	_ caddy.Provisioner  = (*SNIPassthrough)(nil)
	_ layer4.NextHandler = (*SNIPassthrough)(nil)
	_ routeConfig        = (*passthroughConfig)(nil)
	_ tunnel.Route       = liveTunnels{}
)
