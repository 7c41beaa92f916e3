package holdfast

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/opening"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
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

	// What happens to clients whose backend is lost.
	Resume *Resume `json:"resume,omitempty"`

	// What the next backend gets of what the client sent.
	Replay *Replay `json:"replay,omitempty"`

	// Over how long connections that leave a backend are spread. Zero moves all at
	// once.
	// Default: `10s`.
	DrainWindow *caddy.Duration `json:"drain_window,omitempty"`

	// Whether clients and backends may agree on permessage-deflate (RFC 7692):
	// `on`, `safe` (only with clients that themselves offer
	// client_no_context_takeover) or `off`.
	// Default: `on`.
	Compression string `json:"compression,omitempty"`

	logger     *zap.Logger
	name       string
	config     *routeConfig
	generation *generation
	mode       deflate.Mode
}

// The groups of settings.
type (
	Transport = settings.Transport
	KeepAlive = settings.KeepAlive
	Resume    = settings.Resume
	Replay    = settings.Replay
)

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
	if err := h.live().Check(h.Transport); err != nil {
		return err
	}
	if h.mode, err = deflate.ParseMode(h.Compression); err != nil {
		return err
	}
	t, r := settings.ValueOr(h.Transport, Transport{}), settings.ValueOr(h.Resume, Resume{})
	h.config = &routeConfig{
		json:             string(config),
		handshakeTimeout: settings.DurationOr(t.HandshakeTimeout, settings.HandshakeTimeout),
		concurrency:      settings.ValueOr(r.Concurrency, settings.ResumeConcurrency),
		logger:           h.logger,
	}
	if h.config.settings, err = h.live().Session(); err != nil {
		return err
	}
	dialTimeout := settings.DurationOr(t.DialTimeout, settings.DialTimeout)
	h.config.pool, err = newPool(ctx, h.Upstreams, h.LoadBalancing, dialTimeout)
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
	return h.generation.declare(h.name, by, h.config)
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
		Next:             h.config.pool.each(route, r, w, h.config.pool.upstreams),
		DialTimeout:      h.config.pool.dialTimeout,
		HandshakeTimeout: h.config.handshakeTimeout,
		Logger:           h.logger,
	}, q)
	if err != nil {
		return nil, h.failed(o, w, err)
	}
	if !answer.Upgraded() {
		answer.Relay(o, w)
		return nil, nil
	}
	s, err := answer.Upgrade(o, w, r, liveRoute{route})
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

// live are the settings that matter to live connections.
func (h *WebSocketProxy) live() settings.Live {
	return settings.Live{KeepAlive: h.KeepAlive, Resume: h.Resume, Replay: h.Replay, DrainWindow: h.DrainWindow}
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
