package holdfast

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/holdfast-proxy/caddy-holdfast/internal/health"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
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
//	}
//
// Every subdirective may be there once, but for header_up and header_down. Without
// a name the route is named after the site's first address and the directive's
// place in the site.
func (h *WebSocketProxy) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if err := h.addUpstreams(d, d.RemainingArgs()); err != nil {
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
	type (
		duration = subdirective.Duration
		number   = subdirective.Number
		size     = subdirective.Size
		word     = subdirective.Word
	)
	active, passive := h.HealthChecks.Active, h.HealthChecks.Passive
	return map[string]subdirective.Argument{
		"name":                     word{To: &h.Name},
		"upstream_max_connections": number{To: &h.Limits.PerUpstream},
		"lb_retries":               number{To: &h.LoadBalancing.Retries},
		"lb_try_duration":          duration{To: &h.LoadBalancing.TryDuration},
		"lb_try_interval":          duration{To: &h.LoadBalancing.TryInterval},
		"dial_timeout":             duration{To: &h.Transport.DialTimeout},
		"handshake_timeout":        duration{To: &h.Transport.HandshakeTimeout},
		"proxy_protocol":           word{To: &h.Transport.ProxyProtocol},
		"health_interval":          duration{To: &active.Interval},
		"health_timeout":           duration{To: &active.Timeout},
		"health_fails":             number{To: &active.Fails},
		"health_passes":            number{To: &active.Passes},
		"fail_duration":            duration{To: &passive.FailDuration},
		"max_fails":                number{To: &passive.MaxFails},
		"unhealthy_latency":        duration{To: &passive.UnhealthyLatency},
		"resume_timeout":           duration{To: &h.Resume.Timeout, Off: true},
		"resume_concurrency":       number{To: &h.Resume.Concurrency},
		"resume_limit":             number{To: &h.Resume.Limit},
		"replay":                   word{To: &h.Replay.Mode},
		"replay_buffer":            size{To: &h.Replay.Buffer},
		"replay_overflow":          word{To: &h.Replay.Overflow},
		"drain_window":             duration{To: &h.DrainWindow},
		"ping_interval":            duration{To: &h.KeepAlive.PingInterval, Off: true},
		"ping_timeout":             duration{To: &h.KeepAlive.PingTimeout},
		"idle_timeout":             duration{To: &h.KeepAlive.IdleTimeout, Off: true},
		"first_data_timeout":       duration{To: &h.KeepAlive.FirstDataTimeout, Off: true},
		"max_lifetime":             duration{To: &h.KeepAlive.MaxLifetime, Off: true},
		"write_timeout":            duration{To: &h.KeepAlive.WriteTimeout, Off: true},
		"max_connections":          number{To: &h.Limits.MaxConnections},
		"max_connections_per_ip":   number{To: &h.Limits.MaxConnectionsPerIP},
		"client_max_message_size":  size{To: &h.Limits.ClientMaxMessageSize},
		"server_max_message_size":  size{To: &h.Limits.ServerMaxMessageSize},
		"compression":              word{To: &h.Compression},
		"default_origin":           word{To: &h.Headers.DefaultOrigin},
	}
}

// parseOther takes the subdirectives of no, several or special arguments.
func (h *WebSocketProxy) parseOther(d *caddyfile.Dispenser, name string) (known bool, err error) {
	switch name {
	case "to":
		args := d.RemainingArgs()
		if err := subdirective.Count(d, name, args, 1, len(args)); err != nil {
			return true, err
		}
		return true, h.addUpstreams(d, args)
	case "dynamic":
		h.DynamicUpstreamsRaw, err = parseDynamic(d)
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
		err = h.parseInterval(d)
	case "resume_on":
		err = h.parseCodes(d)
	case "allowed_origins":
		h.Limits.AllowedOrigins = d.RemainingArgs()
		err = subdirective.Count(d, name, h.Limits.AllowedOrigins, 1, len(h.Limits.AllowedOrigins))
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
	c.Active, c.Passive = nilIfZero(c.Active), nilIfZero(c.Passive)
	h.HealthChecks = nilIfZero(c)
	h.LoadBalancing, h.Transport, h.KeepAlive = nilIfZero(h.LoadBalancing), nilIfZero(h.Transport), nilIfZero(h.KeepAlive)
	h.Resume, h.Replay, h.Limits = nilIfZero(h.Resume), nilIfZero(h.Replay), nilIfZero(h.Limits)
	h.Headers = nilIfZero(h.Headers)
}

// nilIfZero returns nil for a group in which nothing is set.
func nilIfZero[T any](group *T) *T {
	if reflect.ValueOf(group).Elem().IsZero() {
		return nil
	}
	return group
}

// parseDynamic takes a module that finds upstreams.
func parseDynamic(d *caddyfile.Dispenser) (json.RawMessage, error) {
	if !d.NextArg() {
		return nil, d.Err("dynamic: missing argument")
	}
	name := d.Val()
	const namespace = "http.reverse_proxy.upstreams."
	if _, err := caddy.GetModule(namespace + name); err != nil {
		return nil, d.Errf("dynamic: unknown module %q", name)
	}
	source, err := caddyfile.UnmarshalModule(d, namespace+name)
	if err != nil {
		return nil, fmt.Errorf("dynamic: %w", err)
	}
	return caddyconfig.JSONModuleObject(source, "source", name, nil), nil
}

// parseInterval takes the shortest and, if it is given, the longest pause.
func (h *WebSocketProxy) parseInterval(d *caddyfile.Dispenser) error {
	name, args := d.Val(), d.RemainingArgs()
	for i, to := range []**caddy.Duration{&h.Resume.MinInterval, &h.Resume.MaxInterval} {
		if i < len(args) {
			if err := (subdirective.Duration{To: to}).Parse(args[i]); err != nil {
				return d.Errf("%s: %w", name, err)
			}
		}
	}
	return subdirective.Count(d, name, args, 1, 2)
}

// parseCodes takes close codes.
func (h *WebSocketProxy) parseCodes(d *caddyfile.Dispenser) error {
	name, args := d.Val(), d.RemainingArgs()
	codes := make([]uint16, 0, len(args))
	for _, arg := range args {
		code, err := strconv.ParseUint(arg, 10, 16)
		if err != nil {
			return d.Errf("%s: invalid close code %q", name, arg)
		}
		codes = append(codes, uint16(code))
	}
	h.Resume.CloseCodes = &codes
	return subdirective.Count(d, name, args, 1, len(args))
}

func (h *WebSocketProxy) addUpstreams(d *caddyfile.Dispenser, addrs []string) error {
	for _, addr := range addrs {
		if _, err := pool.ParseAddress(addr); err != nil {
			return d.WrapErr(err)
		}
		h.Upstreams = append(h.Upstreams, &Upstream{Dial: addr})
	}
	return nil
}

// parseWebSocketProxy is the directive in a site block.
func parseWebSocketProxy(helper httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	h := new(WebSocketProxy)
	if err := h.UnmarshalCaddyfile(helper.Dispenser); err != nil {
		return nil, err
	}
	// The ordinal counts the directives of a site, named ones too, so that naming
	// one does not rename the others. The helper's state is that of all sites.
	site := siteAddress(helper)
	key := "holdfast.websocket_proxy " + site
	n, _ := helper.State[key].(int)
	helper.State[key] = n + 1
	if h.Name == "" {
		h.Name = fmt.Sprintf("%s#%d", site, n+1)
	}
	return h, nil
}

// siteAddress returns the first address of the site that a directive stands in.
// Caddy keeps it in an unexported field of the helper, where reflection may read
// it, but nothing else may; a test says when that has changed.
func siteAddress(helper httpcaddyfile.Helper) string {
	if block := reflect.ValueOf(helper).FieldByName("parentBlock"); block.Kind() == reflect.Struct {
		if keys := block.FieldByName("Keys"); keys.Kind() == reflect.Slice && keys.Len() > 0 {
			if text := keys.Index(0).FieldByName("Text"); text.Kind() == reflect.String && text.String() != "" {
				return text.String()
			}
		}
	}
	return "site"
}

// UnmarshalCaddyfile sets the app up from Caddyfile tokens. Syntax:
//
//	connection_registry {
//	    max_connections        <n>
//	    max_connections_per_ip <n> [<ipv6_prefix>]
//	    replay_memory          <size>
//	    orphan_timeout         <duration>
//	    shutdown_timeout       <duration>
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
	}
	err := subdirective.Each(d, nil, func(name string) (bool, error) {
		if word, ok := words[name]; ok {
			return true, subdirective.One(d, word)
		}
		if name == "max_connections_per_ip" {
			return true, a.parsePerIP(d)
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

// parsePerIP takes the limit and, if it is given, the length of the prefix that
// counts as one IPv6 client.
func (a *ConnectionRegistry) parsePerIP(d *caddyfile.Dispenser) error {
	name, args := d.Val(), d.RemainingArgs()
	for i, to := range []**int{&a.MaxConnectionsPerIP, &a.IPv6Prefix} {
		if i < len(args) {
			if err := (subdirective.Number{To: to}).Parse(args[i]); err != nil {
				return d.Errf("%s: %w", name, err)
			}
		}
	}
	return subdirective.Count(d, name, args, 1, 2)
}

// parseRegistryOption is the global option.
func parseRegistryOption(d *caddyfile.Dispenser, existing any) (any, error) {
	if existing != nil {
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
	_ caddyfile.Unmarshaler = (*ConnectionRegistry)(nil)
)
