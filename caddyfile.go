package holdfast

import (
	"fmt"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
	"github.com/holdfast-proxy/caddy-holdfast/internal/settings"
	"github.com/holdfast-proxy/caddy-holdfast/internal/subdirective"
	"github.com/holdfast-proxy/caddy-holdfast/internal/transport"
)

func init() {
	httpcaddyfile.RegisterGlobalOption("connection_registry", parseRegistryOption)
	httpcaddyfile.RegisterHandlerDirective("websocket_proxy", parseWebSocketProxy)
	httpcaddyfile.RegisterDirectiveOrder("websocket_proxy", httpcaddyfile.Before, "reverse_proxy")
}

// UnmarshalCaddyfile sets the handler up from Caddyfile tokens. Syntax:
//
//	websocket_proxy [<matcher>] [<upstreams...>] {
//	    name <route>
//
//	    # backends
//	    to      <upstreams...>
//	    dynamic <module> [...]
//	    upstream_max_connections <n>
//
//	    # load balancing
//	    lb_policy       <name> [<options...>]
//	    lb_retries      <n>
//	    lb_try_duration <duration>
//	    lb_try_interval <duration>
//
//	    # connecting
//	    dial_timeout      <duration>
//	    handshake_timeout <duration>
//	    tls | tls_...     as in reverse_proxy's http transport
//	    proxy_protocol    v1|v2
//
//	    # active health checks
//	    health_interval <duration>
//	    health_timeout  <duration>
//	    health_fails    <n>
//	    health_passes   <n>
//	    health_ws   [<uri>] { ... }
//	    health_http [<uri>] { ... }
//
//	    # passive health checks
//	    fail_duration     <duration>
//	    max_fails         <n>
//	    unhealthy_latency <duration>
//	    migrate_on_unhealthy
//
//	    # when a backend is lost
//	    resume_timeout     <duration>|off
//	    resume_interval    <min> [<max>]
//	    resume_concurrency <n>
//	    resume_on          <close codes...>
//	    resume_limit       <n>
//	    replay             unacked|unsent|strict|off
//	    replay_buffer      <size>
//	    replay_overflow    pause|close
//	    drain_window       <duration>
//
//	    # keeping alive
//	    ping_interval      <duration>|off
//	    ping_timeout       <duration>
//	    idle_timeout       <duration>|off
//	    first_data_timeout <duration>|off
//	    max_lifetime       <duration>|off
//	    write_timeout      <duration>|off
//
//	    # limits
//	    max_connections         <n>
//	    max_connections_per_ip  <n>
//	    client_max_message_size <size>
//	    server_max_message_size <size>
//	    allowed_origins         <patterns...>
//	    compression             on|safe|off
//
//	    # headers
//	    header_up   ...   as in reverse_proxy
//	    header_down ...
//	    default_origin <origin>
//
//	    log
//	}
//
// Every subdirective may be there once, but for header_up and header_down. Without
// a name the route is named after the site's first address and the directive's
// place in the site.
func (h *WebSocketProxy) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if err := addUpstreams(d, &h.Upstreams, pool.ParseAddress); err != nil {
		return err
	}
	h.Transport, h.KeepAlive, h.Resume, h.Replay = new(Transport), new(KeepAlive), new(Resume), new(Replay)
	h.LoadBalancing, h.Limits, h.Headers = new(LoadBalancing), new(Limits), new(Headers)
	h.HealthChecks = &HealthChecks{Active: new(health.Active), Passive: new(PassiveHealthChecks)}
	words := h.words()
	err := subdirective.Each(d, []string{"header_up", "header_down"}, func(name string) (bool, error) {
		if word, ok := words[name]; ok {
			return true, subdirective.One(d, word)
		}
		return h.parseOther(d, name)
	})
	if err != nil {
		return err
	}
	if len(h.Upstreams) == 0 && len(h.DynamicUpstreamsRaw) == 0 {
		return d.Err("websocket_proxy needs at least one upstream")
	}
	h.dropEmptyGroups()
	if err := h.check(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// words are the subdirectives of one argument.
func (h *WebSocketProxy) words() map[string]subdirective.Argument {
	passive := h.HealthChecks.Passive
	return subdirective.Join(
		poolWords(h.LoadBalancing, &h.HealthChecks.Active.Schedule, &passive.Failures),
		h.Transport.Words(), h.KeepAlive.Words(), h.Resume.Words(), h.Replay.Words(), h.Limits.Words(),
		map[string]subdirective.Argument{
			"name":              subdirective.Word{To: &h.Name},
			"unhealthy_latency": subdirective.Duration{To: &passive.UnhealthyLatency},
			"drain_window":      subdirective.Duration{To: &h.DrainWindow},
			"compression":       subdirective.Word{To: &h.Compression},
			"default_origin":    subdirective.Word{To: &h.Headers.DefaultOrigin},
		})
}

// parseOther takes the subdirectives of no, several or special arguments.
func (h *WebSocketProxy) parseOther(d *caddyfile.Dispenser, name string) (known bool, err error) {
	switch name {
	case "to":
		err = parseTo(d, &h.Upstreams, pool.ParseAddress)
	case "dynamic":
		h.DynamicUpstreamsRaw, err = pool.ParseDynamic(d)
	case "lb_policy":
		h.LoadBalancing.SelectionPolicyRaw, err = selection.ParseCaddyfile(d)
	case "health_ws":
		h.HealthChecks.Active.WS = new(health.WSCheck)
		err = h.HealthChecks.Active.WS.UnmarshalCaddyfile(d)
	case "health_http":
		h.HealthChecks.Active.HTTP = new(health.HTTPCheck)
		err = h.HealthChecks.Active.HTTP.UnmarshalCaddyfile(d)
	case "migrate_on_unhealthy":
		err = subdirective.Flag(d, &h.HealthChecks.Migrate)
	case "resume_interval":
		err = subdirective.Some(d, 1, subdirective.Duration{To: &h.Resume.MinInterval}, subdirective.Duration{To: &h.Resume.MaxInterval})
	case "resume_on":
		err = h.Resume.ParseCodes(d)
	case "allowed_origins":
		h.Limits.AllowedOrigins = d.RemainingArgs()
		err = subdirective.Count(d, name, h.Limits.AllowedOrigins, 1, len(h.Limits.AllowedOrigins))
	case "log":
		err = subdirective.Flag(d, &h.Log)
	case "header_up":
		err = h.Headers.ParseUp(d)
	case "header_down":
		err = h.Headers.ParseDown(d)
	default:
		return transport.ParseTLS(d, &h.Transport.TLS)
	}
	return true, err
}

// dropEmptyGroups leaves groups out in which nothing is set.
func (h *WebSocketProxy) dropEmptyGroups() {
	c := h.HealthChecks
	c.Active, c.Passive = subdirective.NilIfZero(c.Active), subdirective.NilIfZero(c.Passive)
	h.HealthChecks = subdirective.NilIfZero(c)
	h.LoadBalancing, h.Transport, h.KeepAlive = subdirective.NilIfZero(h.LoadBalancing), subdirective.NilIfZero(h.Transport), subdirective.NilIfZero(h.KeepAlive)
	h.Resume, h.Replay, h.Limits = subdirective.NilIfZero(h.Resume), subdirective.NilIfZero(h.Replay), subdirective.NilIfZero(h.Limits)
	h.Headers = subdirective.NilIfZero(h.Headers)
}

// parseWebSocketProxy is the directive in a site block.
func parseWebSocketProxy(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h := new(WebSocketProxy)
	if err := h.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	// The ordinal counts the directives of a site, named ones too, so that naming
	// one does not rename the others. The helper's state is that of all sites.
	site := subdirective.Site(helper)
	key := "holdfast.websocket_proxy " + site
	n, _ := helper.State[key].(int)
	helper.State[key] = n + 1
	if h.Name == "" {
		h.Name = fmt.Sprintf("%s#%d", site, n+1)
	}
	return h, nil
}

// UnmarshalCaddyfile sets the handler up from Caddyfile tokens. Syntax:
//
//	sni_passthrough [<upstreams...>] {
//	    name <route>
//
//	    # backends
//	    to                       <upstreams...>
//	    upstream_max_connections <n>
//
//	    # load balancing
//	    lb_policy       random|random_choose|least_conn|round_robin|weighted_round_robin|first|ip_hash
//	    lb_retries      <n>
//	    lb_try_duration <duration>
//	    lb_try_interval <duration>
//
//	    # connecting
//	    dial_timeout   <duration>
//	    proxy_protocol v1|v2
//
//	    # health checks
//	    health_interval <duration>
//	    health_timeout  <duration>
//	    health_fails    <n>
//	    health_passes   <n>
//	    health_port     <port>
//	    health_tcp
//	    health_tls      [<server_name>]
//	    fail_duration   <duration>
//	    max_fails       <n>
//	    close_if_unhealthy
//
//	    # keeping alive
//	    keep_alive_treatment  standard|extended|immortal
//	    inactivity_timeout    <duration>
//	    inactivity_multiplier <factor>
//	    inactivity_grace      <duration>
//	    max_lifetime          <duration>|off
//	    half_open_timeout     <duration>
//	    stuck_timeout         <duration>|off
//	    tcp_keepalive         <idle> [<interval> [<count>]] | off
//	    tcp_user_timeout      <duration>|off
//
//	    # limits
//	    max_connections        <n>
//	    max_connections_per_ip <n>
//
//	    log
//	}
//
// Every subdirective may be there once. Without a name the route is named after the
// server's first address and the directive's place in the server.
func (h *SNIPassthrough) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if err := addUpstreams(d, &h.Upstreams, pool.ParsePlainAddress); err != nil {
		return err
	}
	h.Transport, h.KeepAlive, h.Limits = new(PassthroughTransport), new(PassthroughKeepAlive), new(PassthroughLimits)
	h.KeepAlive.TCPKeepAlive, h.LoadBalancing = new(settings.TCPKeepAlive), new(LoadBalancing)
	h.HealthChecks = &PassthroughHealthChecks{Active: new(health.ActiveLayer4), Passive: new(Failures)}
	words := h.words()
	err := subdirective.Each(d, nil, func(name string) (bool, error) {
		if word, ok := words[name]; ok {
			return true, subdirective.One(d, word)
		}
		return h.parseOther(d, name)
	})
	if err != nil {
		return err
	}
	if len(h.Upstreams) == 0 {
		return d.Err("sni_passthrough needs at least one upstream")
	}
	c := h.HealthChecks
	c.Active, c.Passive = subdirective.NilIfZero(c.Active), subdirective.NilIfZero(c.Passive)
	h.KeepAlive.TCPKeepAlive = subdirective.NilIfZero(h.KeepAlive.TCPKeepAlive)
	h.HealthChecks, h.LoadBalancing = subdirective.NilIfZero(c), subdirective.NilIfZero(h.LoadBalancing)
	h.Transport, h.KeepAlive, h.Limits = subdirective.NilIfZero(h.Transport), subdirective.NilIfZero(h.KeepAlive), subdirective.NilIfZero(h.Limits)
	if err := h.check(); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// words are the subdirectives of one argument.
func (h *SNIPassthrough) words() map[string]subdirective.Argument {
	active := h.HealthChecks.Active
	return subdirective.Join(
		poolWords(h.LoadBalancing, &active.Schedule, h.HealthChecks.Passive),
		h.Transport.Words(), h.KeepAlive.Words(), h.Limits.Words(),
		map[string]subdirective.Argument{
			"name":        subdirective.Word{To: &h.Name},
			"health_port": subdirective.Number{To: &active.Port},
		})
}

// parseOther takes the subdirectives of no, several or special arguments.
func (h *SNIPassthrough) parseOther(d *caddyfile.Dispenser, name string) (known bool, err error) {
	active := h.HealthChecks.Active
	switch name {
	case "to":
		err = parseTo(d, &h.Upstreams, pool.ParsePlainAddress)
	case "lb_policy":
		h.LoadBalancing.SelectionPolicyRaw, err = selection.ParseCaddyfile(d)
	case "health_tcp":
		err = subdirective.Flag(d, &active.TCP)
	case "health_tls":
		active.TLS = new(health.TLSCheck)
		err = subdirective.Some(d, 0, subdirective.Word{To: &active.TLS.ServerName})
	case "close_if_unhealthy":
		err = subdirective.Flag(d, &h.HealthChecks.CloseIfUnhealthy)
	case "tcp_keepalive":
		k := h.KeepAlive.TCPKeepAlive
		err = subdirective.Some(d, 1,
			subdirective.Duration{To: &k.Idle, Off: true}, subdirective.Duration{To: &k.Interval}, subdirective.Number{To: &k.Count})
	case "log":
		err = subdirective.Flag(d, &h.Log)
	default:
		if settings.WebSocketOnly(name) {
			err = d.Errf("%s: sni_passthrough passes on what it cannot read: it sees no HTTP and no WebSocket frames, and ends no TLS", name)
		}
		return err != nil, err
	}
	return true, err
}

// UnmarshalCaddyfile sets the app up from Caddyfile tokens. Syntax:
//
//	connection_registry {
//	    max_connections        <n>
//	    max_connections_per_ip <n> [<ipv6_prefix>]
//	    pressure               <percent>
//	    replay_memory          <size>
//	    orphan_timeout         <duration>
//	    shutdown_timeout       <duration>
//	    long_lived             <duration>|off
//	}
func (a *ConnectionRegistry) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the option's name
	if d.NextArg() {
		return d.Errf("connection_registry: surplus argument %q", d.Val())
	}
	words := map[string]subdirective.Argument{
		"max_connections":  subdirective.Number{To: &a.MaxConnections},
		"orphan_timeout":   subdirective.Duration{To: &a.OrphanTimeout},
		"shutdown_timeout": subdirective.Duration{To: &a.ShutdownTimeout},
		"replay_memory":    subdirective.Size{To: &a.ReplayMemory},
		"pressure":         subdirective.Number{To: &a.Pressure},
		"long_lived":       subdirective.Duration{To: &a.LongLived, Off: true},
	}
	err := subdirective.Each(d, nil, func(name string) (bool, error) {
		if word, ok := words[name]; ok {
			return true, subdirective.One(d, word)
		}
		if name == "max_connections_per_ip" {
			return true, subdirective.Some(d, 1, subdirective.Number{To: &a.MaxConnectionsPerIP}, subdirective.Number{To: &a.IPv6Prefix})
		}
		return false, nil
	})
	if err == nil {
		if err = a.Validate(); err != nil {
			err = d.WrapErr(err)
		}
	}
	return err
}

// parseRegistryOption is the global option.
func parseRegistryOption(d *caddyfile.Dispenser, existing any) (any, error) {
	if existing != nil {
		d.Next()
		return nil, d.Err("connection_registry: repeated")
	}
	a := new(ConnectionRegistry)
	if err := a.UnmarshalCaddyfile(d); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: "connection_registry", Value: caddyconfig.JSON(a, nil)}, nil
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*WebSocketProxy)(nil)
	_ caddyfile.Unmarshaler = (*SNIPassthrough)(nil)
	_ caddyfile.Unmarshaler = (*ConnectionRegistry)(nil)
)
