package holdfast

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	"go.uber.org/zap"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/opening"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
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

	// The backends. At least one, unless there is a dynamic source; with one, they
	// are for when it has no answer.
	Upstreams []*Upstream `json:"upstreams,omitempty"`

	// A module that knows the backends, and is asked for every connection and about
	// once a second besides: those that it does not name any more are left. The
	// second holds for sources whose answer does not depend on the request.
	DynamicUpstreamsRaw json.RawMessage `json:"dynamic_upstreams,omitempty" caddy:"namespace=http.reverse_proxy.upstreams inline_key=source"`

	// How an upstream is chosen.
	LoadBalancing *LoadBalancing `json:"load_balancing,omitempty"`

	// Which upstreams are fit for connections.
	HealthChecks *HealthChecks `json:"health_checks,omitempty"`

	// How an upstream is connected to.
	Transport *Transport `json:"transport,omitempty"`

	// How a dead or unused connection is found and ended.
	KeepAlive *KeepAlive `json:"keep_alive,omitempty"`

	// What happens to clients whose backend is lost.
	Resume *Resume `json:"resume,omitempty"`

	// What the next backend gets of what the client sent.
	Replay *Replay `json:"replay,omitempty"`

	// How many connections there may be, of what size their messages, from where.
	Limits *Limits `json:"limits,omitempty"`

	// Changes to headers.
	Headers *Headers `json:"headers,omitempty"`

	// Over how long connections that leave a backend are spread. Zero moves all at
	// once.
	// Default: `10s`.
	DrainWindow *caddy.Duration `json:"drain_window,omitempty"`

	// Whether clients and backends may agree on permessage-deflate (RFC 7692):
	// `on`, `safe` (only with clients that themselves offer
	// client_no_context_takeover) or `off`.
	// Default: `on`.
	Compression string `json:"compression,omitempty"`

	// Whether there is an access-log entry for each connection, at its end.
	// Default: `false`.
	Log bool `json:"log,omitempty"`

	logger     *zap.Logger
	name       string
	config     *webSocketConfig
	generation *generation
	mode       deflate.Mode
	origins    handshake.Origins
}

// The groups of settings.
type (
	Transport = settings.Transport
	KeepAlive = settings.KeepAlive
	Resume    = settings.Resume
	Replay    = settings.Replay
	Limits    = settings.Limits
	Headers   = handshake.Headers
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
	if err := h.check(); err != nil {
		return err
	}
	t, r, l := settings.ValueOr(h.Transport, Transport{}), settings.ValueOr(h.Resume, Resume{}), settings.ValueOr(h.Limits, Limits{})
	c := &webSocketConfig{
		routeCommon: routeCommon{
			kind:   registry.WebSocket,
			json:   string(config),
			limits: registry.Limits{Connections: l.MaxConnections, PerIP: l.MaxConnectionsPerIP},
			log:    h.Log,
			logger: h.logger,
		},
		dialTimeout:      settings.DurationOr(t.DialTimeout, settings.DialTimeout),
		handshakeTimeout: settings.DurationOr(t.HandshakeTimeout, settings.HandshakeTimeout),
		concurrency:      settings.ValueOr(r.Concurrency, settings.ResumeConcurrency),
	}
	if c.settings, err = h.live().Session(); err != nil {
		return err
	}
	if h.mode, err = deflate.ParseMode(h.Compression); err != nil {
		return err
	}
	if h.origins, err = handshake.ParseOrigins(l.AllowedOrigins); err != nil {
		return err
	}
	if err := h.Headers.Provision(ctx); err != nil {
		return err
	}
	upstreams := h.pool()
	if len(h.DynamicUpstreamsRaw) > 0 {
		source, err := ctx.LoadModule(h, "DynamicUpstreamsRaw")
		if err != nil {
			return fmt.Errorf("loading dynamic upstreams: %w", err)
		}
		upstreams.source = source.(reverseproxy.UpstreamSource)
	}
	if c.pool, err = upstreams.provision(ctx, whenLeft(c)); err != nil {
		return err
	}
	server := "websocket_proxy"
	if srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		server = srv.Name()
	}
	h.config, h.name, h.generation, err = declare(ctx, server, h.Name, c)
	return err
}

// check refuses settings that mean nothing; the error names the subdirective.
func (h *WebSocketProxy) check() error {
	if err := checkName(h.Name); err != nil {
		return err
	}
	if _, err := deflate.ParseMode(h.Compression); err != nil {
		return fmt.Errorf("compression: %w", err)
	}
	if _, err := handshake.ParseOrigins(settings.ValueOr(h.Limits, Limits{}).AllowedOrigins); err != nil {
		return err
	}
	if err := h.Headers.Check(); err != nil {
		return err
	}
	if err := h.live().Check(h.Transport); err != nil {
		return err
	}
	s := h.pool()
	if err := s.check(); err != nil {
		return err
	}
	if s.leaveUnhealthy && s.active == nil && settings.DurationOr(s.passive.FailDuration, 0) == 0 {
		return errors.New("migrate_on_unhealthy needs health checks")
	}
	return nil
}

// pool is what the handler says about its upstreams.
func (h *WebSocketProxy) pool() *poolSettings {
	t, c := settings.ValueOr(h.Transport, Transport{}), settings.ValueOr(h.HealthChecks, HealthChecks{})
	s := &poolSettings{
		upstreams: h.Upstreams, parse: pool.ParseAddress, dynamic: h.DynamicUpstreamsRaw, balancing: h.LoadBalancing,
		passive: settings.ValueOr(c.Passive, PassiveHealthChecks{}), leaveUnhealthy: c.Migrate,
		dialTimeout: settings.DurationOr(t.DialTimeout, settings.DialTimeout), tls: t.TLS, proxyProtocol: t.ProxyProtocol,
		maxConnections: settings.ValueOr(h.Limits, Limits{}).PerUpstream,
	}
	if c.Active != nil { // a nil in an interface would be something
		s.active = c.Active
	}
	return s
}

// ServeHTTP proxies r if it asks for a WebSocket. It returns as soon as the
// tunnel stands, which then runs on its own, or cannot be had.
func (h *WebSocketProxy) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if !handshake.IsUpgrade(r) {
		return next.ServeHTTP(w, r)
	}
	route := live.route(h.generation, registry.WebSocket, h.name)
	if route == nil {
		return h.unavailable(w, registry.ErrRouteGone)
	}
	if no := handshake.Check(r, h.origins); no != nil {
		if no.Status == http.StatusForbidden {
			route.Refused("origin")
		} else {
			route.Refused("handshake")
		}
		handshake.CopyHeader(w.Header(), no.Header)
		return caddyhttp.Error(no.Status, no.Err)
	}
	o := opening.New(r.Context())
	if err := o.Admit(live.registry, route, clientInfo(r)); err != nil {
		return h.refused(w, err)
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
	client := clientOf(r)
	trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool)
	ip, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	q, err := handshake.NewRequest(r, handshake.Client{ID: o.ID(), IP: ip, Trusted: trusted},
		deflate.Negotiate(r.Header["Sec-Websocket-Extensions"], h.mode), h.Headers)
	if err != nil {
		route.Refused("handshake")
		return nil, caddyhttp.Error(http.StatusBadRequest, err)
	}
	answer, err := o.Reach(h.config.opening(route, client, pool.Opening, ""), q)
	if err != nil {
		if errors.Is(err, opening.ErrNoUpstream) {
			route.Refused("no_upstream")
		}
		return nil, h.failed(o, w, err)
	}
	if !answer.Upgraded() {
		answer.Relay(o, w, h.Headers.Down(r))
		return nil, nil
	}
	s, err := answer.Upgrade(o, w, r, h.Headers.Down(r), liveRoute{route}, h.config.pool.Expand(client.Replace))
	if err != nil {
		return nil, h.failed(o, w, err)
	}
	return s, nil
}

// failed answers a client for which no session could be made.
func (h *WebSocketProxy) failed(o *opening.Opening, w http.ResponseWriter, err error) error {
	if errors.Is(err, opening.ErrEnded) || errors.Is(err, opening.ErrNoUpstream) {
		return h.unavailable(w, err)
	}
	return caddyhttp.Error(o.Status(err), err)
}

// refused refuses a client for which there is no room.
func (h *WebSocketProxy) refused(w http.ResponseWriter, err error) error {
	var limit *registry.LimitError
	if errors.As(err, &limit) && limit.Reason == registry.LimitPerIP {
		w.Header().Set("Retry-After", retryAfter)
		return caddyhttp.Error(http.StatusTooManyRequests, err)
	}
	return h.unavailable(w, err)
}

// unavailable refuses a client that may try again later.
func (h *WebSocketProxy) unavailable(w http.ResponseWriter, err error) error {
	w.Header().Set("Retry-After", retryAfter)
	return caddyhttp.Error(http.StatusServiceUnavailable, err)
}

// live are the settings that matter to live connections.
func (h *WebSocketProxy) live() settings.Live {
	return settings.Live{KeepAlive: h.KeepAlive, Resume: h.Resume, Replay: h.Replay, Limits: h.Limits, DrainWindow: h.DrainWindow}
}

// clientInfo is what the registry shows of a request.
func clientInfo(r *http.Request) registry.Info {
	info := registry.Info{
		Kind: registry.WebSocket, Client: registry.ClientIP(clientAddr(r).Addr()), Host: r.Host, URI: r.RequestURI, Protocol: "h1",
	}
	if r.TLS != nil {
		info.SNI = r.TLS.ServerName
	}
	return info
}

// clientOf returns what a pool needs to know of a client.
func clientOf(r *http.Request) pool.Client {
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	return pool.Client{Request: r, Addr: clientAddr(r), Replace: func(s string) string { return repl.ReplaceAll(s, "") }}
}

// clientAddr is the client's address as Caddy trusts it; its port is known if that
// is the peer itself.
func clientAddr(r *http.Request) netip.AddrPort {
	text, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
	ip, err := netip.ParseAddr(text)
	if err != nil {
		return netip.AddrPort{}
	}
	if peer, err := netip.ParseAddrPort(r.RemoteAddr); err == nil && peer.Addr() == ip {
		return peer
	}
	return netip.AddrPortFrom(ip, 0)
}

// Interface guards
var (
	_ caddy.Provisioner           = (*WebSocketProxy)(nil)
	_ caddyhttp.MiddlewareHandler = (*WebSocketProxy)(nil)
)
