package holdfast

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/opening"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// live is what outlives every config of the process: the connections, their
// routes, and which configs are in force.
var live = &lifecycle{registry: registry.New(), checkers: health.NewCheckers()}

// lifecycle decides what a config's coming and going means for connections.
// During a reload two configs serve at once, and the newer one may yet fail;
// so what live connections are told, which cannot be taken back, is told when
// the older one stops: Caddy does that when all of the newer one has started.
type lifecycle struct {
	registry *registry.Registry
	checkers *health.Checkers // active health checks, shared by configs that have the same
	ending   sync.Once

	mu      sync.Mutex    // guards what follows, and the generations' fields
	started []*generation // the configs in force, oldest first
}

// generation is what one config says. It holds plain values only: it may be
// kept by what outlives the config.
type generation struct {
	orphanTimeout   time.Duration
	shutdownTimeout time.Duration
	replayMemory    int64
	limits          registry.Limits
	ipv6Prefix      int
	watch           registry.Watch
	routes          map[string]*declaration // complete when the config is provisioned
	logger          *zap.Logger

	retained bool
	stopped  bool
	serves   atomic.Bool // retained and not stopped: its routes are there, and need no lock
}

// declaration is a route as a config declares it.
type declaration struct {
	by     string // the first handler that declared it, for error messages
	config routeConfig
	route  *registry.Route // set once the generation is retained
}

// declare adds the route of a handler on a server to the generation that is being
// provisioned, and returns its config and its name; without one it is named after
// the server and the handler's place there. Handlers of the same name share a route
// and its config if they say the same.
func declare[C routeConfig](ctx caddy.Context, server, name string, config C) (C, string, *generation, error) {
	app, err := ctx.App("connection_registry")
	if err != nil {
		return config, "", nil, err
	}
	reg := app.(*ConnectionRegistry)
	g := reg.generation
	reg.ordinals[server]++
	by := fmt.Sprintf("%s#%d", server, reg.ordinals[server])
	name = cmp.Or(name, by)
	d, ok := g.routes[name]
	if !ok {
		g.routes[name] = &declaration{by: by, config: config}
		return config, name, g, nil
	}
	same, ok := d.config.(C)
	if !ok || d.config.common().json != config.common().json {
		return config, "", nil, fmt.Errorf("route name %q is used by %s and by %s with different settings", name, d.by, by)
	}
	return same, name, g, nil
}

// checkName refuses names of routes that would not be what they seem.
func checkName(name string) error {
	if strings.Contains(name, "{") {
		return fmt.Errorf("name: placeholders mean nothing here: %q", name)
	}
	return nil
}

// start adds a generation. It is in force once it is the only one.
func (l *lifecycle) start(g *generation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retain(g)
	l.started = append(l.started, g)
	if len(l.started) == 1 {
		l.apply(g)
		l.settle(g)
	}
}

// stop takes a generation back. The one that is left is in force: the newer one
// or, if a reload has failed, the older one as before. Routes that nobody declares
// any more are gone: their connections are closed within the orphan timeout.
// Upstreams that a route has lost are left within its drain window.
func (l *lifecycle) stop(g *generation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g.stopped {
		return
	}
	g.stopped = true
	g.serves.Store(false)
	for i, s := range l.started {
		if s == g {
			l.started = append(l.started[:i:i], l.started[i+1:]...)
			break
		}
	}
	rule := g
	if n := len(l.started); n > 0 {
		rule = l.started[n-1]
		l.apply(rule)
		l.settle(rule)
	}
	if !g.retained {
		return
	}
	for name, d := range g.routes {
		d.config.common().pool.Stop()
		if l.registry.Release(d.route) {
			continue
		}
		n := l.registry.EndPaced(d.route, rule.orphanTimeout, registry.Ending{Reason: registry.Orphan})
		if n > 0 {
			rule.logger.Info("route is gone, closing its connections",
				zap.String("route", name), zap.Int("count", n), zap.Duration("duration", rule.orphanTimeout))
		}
	}
}

// route returns the live route of a name, or nil if it is gone. A request may be
// served before all apps of its config have started, so the first one retains
// the routes; and after the config has been stopped, when the route is the one
// of the config that followed, provided that it is of the same kind there.
func (l *lifecycle) route(g *generation, kind registry.Kind, name string) *registry.Route {
	if !g.serves.Load() { // else a reload that has many connections to tell would be waited for
		g = l.serving(g)
	}
	d := g.routes[name]
	if d == nil || d.config.common().kind != kind {
		return nil
	}
	return d.route
}

// serving returns the generation by which requests of g are served, with its routes.
func (l *lifecycle) serving(g *generation) *generation {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g.stopped && len(l.started) > 0 {
		g = l.started[len(l.started)-1]
	}
	l.retain(g)
	return g
}

func init() {
	// The running config may have no app that hears the stop, while connections
	// of an earlier one are still being closed.
	caddy.OnExit(func(context.Context) {
		live.shutdown(&generation{shutdownTimeout: defaultShutdownTimeout, logger: caddy.Log()})
	})
}

// shutdown ends all connections, for good. Only the first call does anything.
func (l *lifecycle) shutdown(g *generation) {
	l.ending.Do(func() { l.endAll(g) })
}

func (l *lifecycle) endAll(g *generation) {
	ctx, cancel := context.WithTimeout(context.Background(), g.shutdownTimeout)
	defer cancel()
	n, began := l.registry.Len(), time.Now()
	cut := l.registry.Shutdown(ctx)
	if n > 0 {
		g.logger.Info("closed all connections",
			zap.Int("count", n), zap.Int("cut", cut), zap.Duration("duration", time.Since(began)))
	}
}

// retain makes the live routes of a generation. mu is held.
func (l *lifecycle) retain(g *generation) {
	if g.retained || g.stopped {
		return
	}
	g.retained = true
	if len(l.started) == 0 {
		l.registry.SetLimits(g.limits, g.ipv6Prefix)
	}
	for _, older := range l.started {
		for _, d := range older.routes {
			d.config.common().alone.Store(false) // what it lacks, this one may have
		}
	}
	for name, d := range g.routes {
		c := d.config.common()
		d.route = l.registry.Retain(c.kind, name)
		// The first settings of a new route; a route in force keeps its own
		// until this generation is the only one.
		if d.route.Settings.CompareAndSwap(nil, d.config) {
			d.route.SetLimits(c.limits)
		}
		c.pool.Start(d.route)
	}
	g.serves.Store(true)
}

// apply lets the settings of a generation count, for live connections too. Those
// whose route or upstream has come back stay. mu is held.
func (l *lifecycle) apply(g *generation) {
	l.registry.ReplayMemory.SetLimit(g.replayMemory)
	l.registry.SetLimits(g.limits, g.ipv6Prefix)
	l.registry.SetWatch(g.watch)
	for _, d := range g.routes {
		c := d.config.common()
		d.route.SetLimits(c.limits)
		l.registry.KeepAll(d.route, d.config.stays)
		if old, _ := d.route.Settings.Swap(d.config).(routeConfig); old == nil || old.common().json != c.json {
			l.registry.ReconsiderAll(d.route)
		}
	}
}

// settle makes the upstreams of a generation the only ones: no other config may
// come back. mu is held.
func (l *lifecycle) settle(g *generation) {
	for _, d := range g.routes {
		d.config.common().alone.Store(true)
		d.config.leave(d.route)
	}
}

// drain sets whether upstreams of a name are drained, in one route or, for "", in
// all, and returns how many connections are there to move.
func (l *lifecycle) drain(upstream, route string, drain bool) (conns int, found bool) {
	routes := l.registry.Drain(upstream, route, drain)
	for _, r := range routes {
		if c, ok := r.Settings.Load().(routeConfig); ok {
			conns += c.leave(r)
		}
	}
	return conns, len(routes) > 0
}

// routeConfig is what a config says about a route, of either kind. It is not changed
// once it is declared.
type routeConfig interface {
	registry.Pool
	common() *routeCommon
	// leave plans for live connections to leave upstreams that are to be left, and
	// returns how many are to move to others.
	leave(route *registry.Route) int
	// stays reports whether connections may stay at the upstream with a key.
	stays(upstream string) bool
}

// routeCommon is what routes of both kinds have.
type routeCommon struct {
	kind   registry.Kind
	json   string // the handler's
	limits registry.Limits
	pool   *pool.Pool
	log    bool // whether there is an access log
	logger *zap.Logger

	// alone is set while there is no other config: only then do connections leave
	// upstreams that the route does not have.
	alone atomic.Bool
}

func (c *routeCommon) common() *routeCommon { return c }

// Upstreams implements registry.Pool.
func (c *routeCommon) Upstreams() []registry.UpstreamState { return c.pool.Upstreams() }

// Logs implements registry.Log.
func (c *routeCommon) Logs() bool { return c.log }

// Ended implements registry.Log: it writes the access log. A WebSocket that no upstream
// has accepted ends without a reason; HTTP's own access log has that.
func (c *routeCommon) Ended(v registry.View) {
	if v.Reason == "" {
		return
	}
	fields := []zap.Field{
		zap.String("id", v.ID), zap.String("kind", string(v.Kind)), zap.String("route", v.Route), zap.String("reason", string(v.Reason)),
		zap.String("remote", v.Client), zap.String("sni", v.SNI), zap.String("upstream", v.Upstream), zap.String("dial", v.Dial),
		zap.Duration("duration", v.AgeDuration()), zap.Uint64("bytes_in", v.BytesIn), zap.Uint64("bytes_out", v.BytesOut),
	}
	if v.Kind == registry.WebSocket {
		fields = append(fields,
			zap.String("host", v.Host), zap.String("uri", v.URI), zap.String("protocol", v.Protocol), zap.String("subprotocol", v.Subprotocol),
			zap.Uint64("messages_in", v.MessagesIn), zap.Uint64("messages_out", v.MessagesOut),
			zap.Int("resumes", v.Resumes), zap.Int("replayed", v.Replayed))
	}
	c.logger.Info("connection ended", fields...)
}

// whenLeft returns what is called when c's upstreams have changed for the worse.
func whenLeft(c routeConfig) func(*registry.Route) {
	return func(route *registry.Route) {
		if route.Settings.Load() == any(c) { // else it does not matter any more
			c.leave(route)
		}
	}
}

// webSocketConfig is what a config says about a route of WebSockets.
type webSocketConfig struct {
	routeCommon
	settings         session.Settings
	dialTimeout      time.Duration
	handshakeTimeout time.Duration
	concurrency      int
}

func (c *webSocketConfig) leave(route *registry.Route) int {
	n := live.registry.MovePaced(route, func(upstream string) bool { return c.leaves(route, upstream) }, c.settings.DrainWindow)
	if n > 0 {
		c.logger.Info("moving connections away from their upstreams",
			zap.String("route", route.Name()), zap.Int("count", n), zap.Duration("duration", c.settings.DrainWindow))
	}
	return n
}

func (c *webSocketConfig) leaves(route *registry.Route, upstream string) bool {
	return c.alone.Load() && !c.pool.Has(upstream) || c.pool.Leaves(route, upstream)
}

// stays: a WebSocket moves, and no end is planned for the sake of its upstream.
func (c *webSocketConfig) stays(string) bool { return true }

// opening returns how to reach the route's upstreams.
func (c *webSocketConfig) opening(route *registry.Route, client pool.Client, why pool.Why, last string) opening.Config {
	return opening.Config{
		Next:             c.pool.Tries(route, client, why, last).Next,
		Tried:            func(t *pool.Target, took time.Duration, err error) { c.pool.Tried(route, t, took, err) },
		DialTimeout:      c.dialTimeout,
		HandshakeTimeout: c.handshakeTimeout,
		Concurrency:      c.concurrency,
		Logger:           c.logger,
	}
}

// liveRoute is a route as its live WebSockets see it: by the newest config.
type liveRoute struct{ route *registry.Route }

func (r liveRoute) config() *webSocketConfig { return r.route.Settings.Load().(*webSocketConfig) }

// Settings implements opening.Pool.
func (r liveRoute) Settings() *session.Settings { return &r.config().settings }

// Leaves implements opening.Pool.
func (r liveRoute) Leaves(upstream string) bool { return r.config().leaves(r.route, upstream) }

// Others implements opening.Pool.
func (r liveRoute) Others(upstream string) bool { return r.config().pool.Others(r.route, upstream) }

// Lost implements opening.Pool.
func (r liveRoute) Lost(up *registry.Upstream) { r.config().pool.Failed(r.route, up) }

// Unanswering implements opening.Pool.
func (r liveRoute) Unanswering(up *registry.Upstream) {
	r.config().logger.Warn("upstream answers no pings; messages count as delivered once its TCP has acknowledged them for ping_timeout",
		zap.String("route", r.route.Name()), zap.String("upstream", up.Name()))
}

// Redial implements opening.Pool.
func (r liveRoute) Redial(q *handshake.Request, addresses map[string]pool.Address, why pool.Why, last string) opening.Config {
	req, err := q.HTTP()
	if err != nil { // it was made of a request, so this does not happen
		req = &http.Request{Method: http.MethodGet, URL: new(url.URL), Header: make(http.Header)}
	}
	client := clientOf(selection.Prepare(req, q.ClientIP(), q.Trusted()))
	client.Addresses = addresses
	return r.config().opening(r.route, client, why, last)
}
