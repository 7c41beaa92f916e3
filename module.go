// Package holdfast is a Caddy plugin that keeps long-lived client connections
// alive while everything behind them changes.
//
// It is three modules: the HTTP handler websocket_proxy (handler.go), the layer4
// handler sni_passthrough (l4passthrough.go), and the app connection_registry with
// its admin API (here). Upstream pools are in pool.go, what outlives a
// config in lifecycle.go, the Caddyfile syntax in caddyfile.go. The mechanisms
// are packages below internal; docs/architecture.md shows how they fit together.
package holdfast

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"

	"github.com/holdfast-proxy/caddy-holdfast/internal/adminapi"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

func init() {
	caddy.RegisterModule(new(ConnectionRegistry))
	caddy.RegisterModule(new(AdminAPI))
	caddy.RegisterModule(new(WebSocketProxy))
	caddy.RegisterModule(new(SNIPassthrough))
}

// Defaults of the connection registry.
const (
	defaultOrphanTimeout   = 10 * time.Second
	defaultShutdownTimeout = 10 * time.Second
	defaultReplayMemory    = 1 << 30
	defaultPressure        = 90 // percent
)

// ConnectionRegistry is the app that knows every connection of this plugin. It
// is loaded by itself with the first handler that needs it; configure it to
// change its settings. Connections outlive the config that accepted them: the
// registry itself is one per process.
type ConnectionRegistry struct {
	// How many connections of both handlers there may be. Clients beyond that get
	// status 503. Zero: any number.
	// Default: `0`.
	MaxConnections *int `json:"max_connections,omitempty"`

	// How many of them may come from one client IP, or one IPv6 prefix. Clients
	// beyond that get status 429. Zero: any number.
	// Default: `0`.
	MaxConnectionsPerIP *int `json:"max_connections_per_ip,omitempty"`

	// The part of an IPv6 address that counts as one client, in bits: 1 to 128. It
	// is that of the routes' own limits as well.
	// Default: `64`.
	IPv6Prefix *int `json:"ipv6_prefix,omitempty"`

	// The percentage of max_connections from which on new connections make those end
	// at once that are ending anyway: the one longest in closing, else in
	// half_open. 1 to 100. Without max_connections it has no effect.
	// Default: `90`.
	Pressure *int `json:"pressure,omitempty"`

	// How long connections live on whose route is gone from the config. They
	// are closed evenly over that time, with code 1001. Zero closes them at once.
	// Default: `10s`.
	OrphanTimeout *caddy.Duration `json:"orphan_timeout,omitempty"`

	// How long a stop of Caddy may take for telling all clients, with code 1012,
	// and for what they still have to be sent. The stop is over as soon as all
	// connections have ended; those left after this time are cut. Zero cuts them
	// at once.
	// Default: `10s`.
	ShutdownTimeout *caddy.Duration `json:"shutdown_timeout,omitempty"`

	// How many bytes the replay buffers of all connections may take together. What
	// does not fit is treated as the route's replay_overflow says. It must be positive.
	// Default: 1 GiB.
	ReplayMemory *int64 `json:"replay_memory,omitempty"`

	// The age at which a connection is logged, once. Zero: never.
	// Default: `0`.
	LongLived *caddy.Duration `json:"long_lived,omitempty"`

	logger     *zap.Logger
	generation *generation
	ordinals   map[string]int // handlers without a name, by server
	running    chan struct{}  // closed by started, when all apps have started
	started    func()
}

// CaddyModule returns the module's information.
func (*ConnectionRegistry) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "connection_registry",
		New: func() caddy.Module { return new(ConnectionRegistry) },
	}
}

// Provision sets the app up. Nothing outside it changes before Start: the config
// may yet fail to load, or only be validated.
func (a *ConnectionRegistry) Provision(ctx caddy.Context) error {
	a.logger = ctx.Logger()
	a.ordinals = make(map[string]int)
	a.running = make(chan struct{})
	a.started = sync.OnceFunc(func() { close(a.running) })
	a.generation = &generation{
		orphanTimeout:   settings.DurationOr(a.OrphanTimeout, defaultOrphanTimeout),
		shutdownTimeout: settings.DurationOr(a.ShutdownTimeout, defaultShutdownTimeout),
		replayMemory:    settings.ValueOr(a.ReplayMemory, defaultReplayMemory),
		limits:          registry.Limits{Connections: a.MaxConnections, PerIP: a.MaxConnectionsPerIP},
		ipv6Prefix:      settings.ValueOr(a.IPv6Prefix, registry.DefaultIPv6Prefix),
		watch: registry.Watch{
			Pressure:  settings.ValueOr(a.Pressure, defaultPressure),
			LongLived: settings.DurationOr(a.LongLived, 0),
			Notices:   notices{a.logger},
		},
		routes: make(map[string]*declaration),
		logger: a.logger,
	}
	for _, c := range live.registry.Collectors() {
		var already prometheus.AlreadyRegisteredError
		if err := ctx.GetMetricsRegistry().Register(c); err != nil && !errors.As(err, &already) {
			a.logger.Warn("registering metrics", zap.Error(err))
		}
	}
	if !sock.CanForgetTLSConfig() {
		a.logger.Warn("with this version of Go, live TLS connections keep the config that accepted them in memory",
			zap.String("go", runtime.Version()))
	}
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting events app: %w", err)
	}
	// "stopping" comes before any app is stopped, so neither the order in which
	// apps stop nor the http app's grace period delays the close frames.
	return events.(*caddyevents.App).Subscribe(&caddyevents.Subscription{
		Events: []string{"started", "stopping"}, Handlers: []caddyevents.Handler{a},
	})
}

// Validate refuses settings that mean nothing.
func (a *ConnectionRegistry) Validate() error {
	for name, d := range map[string]*caddy.Duration{
		"orphan_timeout": a.OrphanTimeout, "shutdown_timeout": a.ShutdownTimeout, "long_lived": a.LongLived,
	} {
		if d != nil && *d < 0 {
			return fmt.Errorf("%s must not be negative: %s", name, time.Duration(*d))
		}
	}
	if n := settings.ValueOr(a.IPv6Prefix, 1); n < 1 || n > 128 {
		return fmt.Errorf("max_connections_per_ip: the IPv6 prefix must be 1 to 128: %d", n)
	}
	if n := settings.ValueOr(a.Pressure, 1); n < 1 || n > 100 {
		return fmt.Errorf("pressure must be 1 to 100 percent: %d", n)
	}
	return settings.First(
		settings.CheckSize("replay_memory", a.ReplayMemory),
		settings.CheckCount("max_connections", a.MaxConnections, 0),
		settings.CheckCount("max_connections_per_ip", a.MaxConnectionsPerIP, 0),
	)
}

// Start adds this config's routes. Its settings are in force when no older config is.
func (a *ConnectionRegistry) Start() error {
	live.start(a.generation)
	return nil
}

// Stop takes them back. It does not wait for connections; see Handle.
func (a *ConnectionRegistry) Stop() error {
	live.stop(a.generation)
	return nil
}

// Cleanup gives back what a config took that was used, but never started.
func (a *ConnectionRegistry) Cleanup() error {
	if a.generation != nil {
		live.stop(a.generation)
	}
	return nil
}

// Handle ends all connections when the process stops. Reloads, which emit the
// same event, leave them alone. Once all apps have started it lets events out.
func (a *ConnectionRegistry) Handle(_ context.Context, e caddy.Event) error {
	switch {
	case e.Name() == "started":
		a.started()
	case caddy.Exiting():
		live.shutdown(a.generation)
	}
	return nil
}

// notices logs what the registry notices.
type notices struct{ logger *zap.Logger }

// Pressure implements registry.Notices.
func (n notices) Pressure(on bool, conns, limit int) {
	fields := []zap.Field{zap.Int("count", conns), zap.Int("limit", limit)}
	if on {
		n.logger.Warn("max_connections is near, ending connections give way", fields...)
	} else {
		n.logger.Info("max_connections is far again", fields...)
	}
}

// LongLived implements registry.Notices.
func (n notices) LongLived(v registry.View) {
	n.logger.Info("connection is long-lived", zap.String("id", v.ID), zap.String("route", v.Route),
		zap.String("remote", v.Client), zap.String("upstream", v.Upstream), zap.Duration("duration", v.AgeDuration()))
}

// Forgotten implements registry.Notices.
func (n notices) Forgotten(v registry.View, removed bool) {
	n.logger.Error("connection was not ended when it should have been", zap.String("id", v.ID), zap.String("route", v.Route),
		zap.String("state", v.State), zap.String("reason", string(v.Reason)), zap.Bool("removed", removed))
}

// AdminAPI serves the registry at Caddy's admin endpoint, below /connections.
type AdminAPI struct{}

// CaddyModule returns the module's information.
func (*AdminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.connections",
		New: func() caddy.Module { return new(AdminAPI) },
	}
}

// Routes returns the API's routes. They are made for every config, also for one
// that then fails, and never cleaned up: they hold nothing but the registry.
func (*AdminAPI) Routes() []caddy.AdminRoute { return adminapi.Routes(live.registry, live.drain) }

// Interface guards
var (
	_ caddy.App           = (*ConnectionRegistry)(nil)
	_ caddy.Provisioner   = (*ConnectionRegistry)(nil)
	_ caddy.Validator     = (*ConnectionRegistry)(nil)
	_ caddy.CleanerUpper  = (*ConnectionRegistry)(nil)
	_ caddyevents.Handler = (*ConnectionRegistry)(nil)
	_ caddy.AdminRouter   = (*AdminAPI)(nil)
	_ registry.Notices    = notices{}
)
