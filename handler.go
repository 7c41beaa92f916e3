package holdfast

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/opening"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// Defaults of websocket_proxy.
const (
	defaultDialTimeout      = 3 * time.Second
	defaultHandshakeTimeout = 10 * time.Second
	defaultPingInterval     = 30 * time.Second
	defaultPingTimeout      = 30 * time.Second
	defaultWriteTimeout     = 30 * time.Second
)

// retryAfter is what clients are told that a stop turns away, in seconds.
const retryAfter = "5"

// WebSocketProxy proxies WebSockets to a pool of upstreams. Every other request
// goes to the next handler.
//
// A connection outlives the config that accepted it: a reload that keeps the
// route, which is known by its name, changes no connection.
type WebSocketProxy struct {
	// The name of the route in API, logs and metrics, and across reloads.
	// Handlers that share a name must have equal settings and are one route.
	// Default: the server's name and an ordinal, like `srv0#1`.
	Name string `json:"name,omitempty"`

	// The backends. At least one.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// How an upstream is chosen.
	LoadBalancing *LoadBalancing `json:"load_balancing,omitempty"`

	// How an upstream is connected to.
	Transport *Transport `json:"transport,omitempty"`

	// How a dead or unused connection is found and ended.
	KeepAlive *KeepAlive `json:"keep_alive,omitempty"`

	// Whether clients and backends may agree on permessage-deflate (RFC 7692):
	// `on`, `safe` (only with clients that themselves offer
	// client_no_context_takeover) or `off`.
	// Default: `on`.
	Compression string `json:"compression,omitempty"`

	logger           *zap.Logger
	name             string
	pool             *pool
	generation       *generation
	mode             deflate.Mode
	handshakeTimeout time.Duration
}

// Transport has the settings of connecting to an upstream.
type Transport struct {
	// How long a TCP connect may take. It must be positive.
	// Default: `3s`.
	DialTimeout *caddy.Duration `json:"dial_timeout,omitempty"`

	// How long an upstream, once connected, may take to answer the handshake.
	// It must be positive.
	// Default: `10s`.
	HandshakeTimeout *caddy.Duration `json:"handshake_timeout,omitempty"`
}

// KeepAlive has the settings of live connections.
type KeepAlive struct {
	// How often each peer is sent a ping; up to 10 % sooner. Zero sends none.
	// Default: `30s`.
	PingInterval *caddy.Duration `json:"ping_interval,omitempty"`

	// How long a peer may be silent after a ping, all of that while the proxy
	// reads from it, before it is taken for dead. It must be positive.
	// Default: `30s`.
	PingTimeout *caddy.Duration `json:"ping_timeout,omitempty"`

	// How long a connection may go without a data frame either way. Zero: for ever.
	// Default: `0`.
	IdleTimeout *caddy.Duration `json:"idle_timeout,omitempty"`

	// How long a connection may go without its first data frame. Zero: for ever.
	// Default: `0`.
	FirstDataTimeout *caddy.Duration `json:"first_data_timeout,omitempty"`

	// How long a connection may live; shortened by up to 10 % at random. Zero:
	// for ever.
	// Default: `0`.
	MaxLifetime *caddy.Duration `json:"max_lifetime,omitempty"`

	// How long a peer's kernel may take no byte of what is written to it. Zero:
	// for ever.
	// Default: `30s`.
	WriteTimeout *caddy.Duration `json:"write_timeout,omitempty"`
}

// CaddyModule returns the module's information.
func (*WebSocketProxy) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.websocket_proxy",
		New: func() caddy.Module { return new(WebSocketProxy) },
	}
}

// Provision sets the handler up and declares its route to the registry.
func (h *WebSocketProxy) Provision(ctx caddy.Context) error {
	h.logger = ctx.Logger()
	config, err := json.Marshal(h) // before modules are loaded out of it
	if err != nil {
		return err
	}
	if err := h.checkDurations(); err != nil {
		return err
	}
	if h.mode, err = deflate.ParseMode(h.Compression); err != nil {
		return err
	}
	h.handshakeTimeout = durationOr(h.transport().HandshakeTimeout, defaultHandshakeTimeout)
	h.pool, err = newPool(ctx, h.Upstreams, h.LoadBalancing, durationOr(h.transport().DialTimeout, defaultDialTimeout))
	if err != nil {
		return err
	}
	app, err := ctx.App("connection_registry")
	if err != nil {
		return err
	}
	reg := app.(*ConnectionRegistry)
	h.generation = reg.generation
	by := reg.nextHandler(ctx)
	if h.name = h.Name; h.name == "" {
		h.name = by
	}
	return h.generation.declare(h.name, by, string(config), h.settings())
}

// nextHandler names a handler by its server and its place there.
func (a *ConnectionRegistry) nextHandler(ctx caddy.Context) string {
	server := "websocket_proxy"
	if srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		server = srv.Name()
	}
	a.ordinals[server]++
	return fmt.Sprintf("%s#%d", server, a.ordinals[server])
}

// ServeHTTP proxies r if it asks for a WebSocket. It returns as soon as the
// tunnel stands, which then runs on its own, or cannot be had.
func (h *WebSocketProxy) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if !handshake.IsUpgrade(r) {
		return next.ServeHTTP(w, r)
	}
	if no := handshake.Check(r); no != nil {
		handshake.CopyHeader(w.Header(), no.Header)
		return caddyhttp.Error(no.Status, no.Err)
	}
	route := live.route(h.generation, h.name)
	if route == nil {
		return h.unavailable(w, registry.ErrRouteGone)
	}
	o := opening.New(r.Context())
	if err := o.Admit(live.registry, route, clientInfo(r)); err != nil {
		return h.unavailable(w, err)
	}
	var s *session.Session
	defer func() {
		if s == nil {
			o.Close() // also when relaying a refusal breaks off, which panics
		}
	}()
	var err error
	if s, err = h.open(o, route, w, r); s != nil {
		// The server ends the request's context when it is through with it: until
		// then its handlers' deferred flushes may touch the connection.
		context.AfterFunc(r.Context(), s.Run)
	}
	return err
}

// open makes a session for the client, or returns nil when it was answered
// otherwise.
func (h *WebSocketProxy) open(o *opening.Opening, route *registry.Route, w http.ResponseWriter, r *http.Request) (*session.Session, error) {
	trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool)
	q, err := handshake.NewRequest(r, o.ID(), trusted, deflate.Negotiate(r.Header["Sec-Websocket-Extensions"], h.mode))
	if err != nil {
		return nil, caddyhttp.Error(http.StatusBadRequest, err)
	}
	answer, err := o.Reach(opening.Config{
		Next:             h.pool.each(route, r, w),
		DialTimeout:      h.pool.dialTimeout,
		HandshakeTimeout: h.handshakeTimeout,
		Logger:           h.logger,
	}, q)
	if err != nil {
		return nil, h.failed(o, w, err)
	}
	if !answer.Upgraded() {
		answer.Relay(o, w)
		return nil, nil
	}
	s, err := answer.Upgrade(o, w, r, func() session.Settings { return route.Settings.Load().(session.Settings) })
	if err != nil {
		return nil, h.failed(o, w, err)
	}
	return s, nil
}

// failed answers a client for which no session could be made.
func (h *WebSocketProxy) failed(o *opening.Opening, w http.ResponseWriter, err error) error {
	if errors.Is(err, opening.ErrEnded) {
		return h.unavailable(w, err)
	}
	return caddyhttp.Error(o.Status(err), err)
}

// unavailable refuses a client that may try again later.
func (h *WebSocketProxy) unavailable(w http.ResponseWriter, err error) error {
	w.Header().Set("Retry-After", retryAfter)
	return caddyhttp.Error(http.StatusServiceUnavailable, err)
}

// settings are what the config says about live connections.
func (h *WebSocketProxy) settings() session.Settings {
	k := h.keepAlive()
	return session.Settings{
		PingInterval:     durationOr(k.PingInterval, defaultPingInterval),
		PingTimeout:      durationOr(k.PingTimeout, defaultPingTimeout),
		IdleTimeout:      durationOr(k.IdleTimeout, 0),
		FirstDataTimeout: durationOr(k.FirstDataTimeout, 0),
		MaxLifetime:      durationOr(k.MaxLifetime, 0),
		WriteTimeout:     durationOr(k.WriteTimeout, defaultWriteTimeout),
	}
}

func (h *WebSocketProxy) transport() Transport {
	if h.Transport == nil {
		return Transport{}
	}
	return *h.Transport
}

func (h *WebSocketProxy) keepAlive() KeepAlive {
	if h.KeepAlive == nil {
		return KeepAlive{}
	}
	return *h.KeepAlive
}

// checkDurations refuses durations that mean nothing.
func (h *WebSocketProxy) checkDurations() error {
	t, k := h.transport(), h.keepAlive()
	for name, d := range map[string]*caddy.Duration{
		"ping_interval": k.PingInterval, "idle_timeout": k.IdleTimeout, "first_data_timeout": k.FirstDataTimeout,
		"max_lifetime": k.MaxLifetime, "write_timeout": k.WriteTimeout,
	} {
		if d != nil && *d < 0 {
			return fmt.Errorf("%s must not be negative: %s", name, time.Duration(*d))
		}
	}
	for name, d := range map[string]*caddy.Duration{
		"dial_timeout": t.DialTimeout, "handshake_timeout": t.HandshakeTimeout, "ping_timeout": k.PingTimeout,
	} {
		if d != nil && *d <= 0 {
			return fmt.Errorf("%s must be positive: %s", name, time.Duration(*d))
		}
	}
	return nil
}

// clientInfo is what the registry shows of a request.
func clientInfo(r *http.Request) registry.Info {
	ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	info := registry.Info{
		Kind: registry.WebSocket, Client: ip, Host: r.Host, URI: r.RequestURI, Protocol: "h1",
	}
	if r.TLS != nil {
		info.SNI = r.TLS.ServerName
	}
	return info
}

// Interface guards
var (
	_ caddy.Provisioner           = (*WebSocketProxy)(nil)
	_ caddyhttp.MiddlewareHandler = (*WebSocketProxy)(nil)
)
