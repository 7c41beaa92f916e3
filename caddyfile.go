package holdfast

import (
	"fmt"
	"reflect"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
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
//	    to <upstreams...>
//
//	    # load balancing
//	    lb_policy least_conn|round_robin
//
//	    # connecting
//	    dial_timeout      <duration>
//	    handshake_timeout <duration>
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
//	    compression on|safe|off
//	}
//
// Every subdirective may be there once. Without a name the route is named after
// the site's first address and the directive's place in the site.
func (h *WebSocketProxy) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if err := h.addUpstreams(d, d.RemainingArgs()); err != nil {
		return err
	}
	h.Transport, h.KeepAlive = new(Transport), new(KeepAlive)
	durations := map[string]durationField{
		"dial_timeout":       {&h.Transport.DialTimeout, false},
		"handshake_timeout":  {&h.Transport.HandshakeTimeout, false},
		"ping_interval":      {&h.KeepAlive.PingInterval, true},
		"ping_timeout":       {&h.KeepAlive.PingTimeout, false},
		"idle_timeout":       {&h.KeepAlive.IdleTimeout, true},
		"first_data_timeout": {&h.KeepAlive.FirstDataTimeout, true},
		"max_lifetime":       {&h.KeepAlive.MaxLifetime, true},
		"write_timeout":      {&h.KeepAlive.WriteTimeout, true},
	}
	err := eachSubdirective(d, func(name string) (bool, error) {
		if f, ok := durations[name]; ok {
			return true, f.parse(d)
		}
		switch name {
		case "name":
			return true, stringArg(d, &h.Name)
		case "to":
			args := d.RemainingArgs()
			if len(args) == 0 {
				return true, d.Err("to: missing argument")
			}
			return true, h.addUpstreams(d, args)
		case "lb_policy":
			return true, h.parsePolicy(d)
		case "compression":
			if err := stringArg(d, &h.Compression); err != nil {
				return true, err
			}
			if _, err := deflate.ParseMode(h.Compression); err != nil {
				return true, d.Errf("compression: %w", err)
			}
			return true, nil
		}
		return false, nil
	})
	if err != nil {
		return err
	}
	if len(h.Upstreams) == 0 {
		return d.Err("websocket_proxy needs at least one upstream")
	}
	if err := h.checkDurations(); err != nil {
		return d.WrapErr(err)
	}
	if *h.Transport == (Transport{}) {
		h.Transport = nil
	}
	if *h.KeepAlive == (KeepAlive{}) {
		h.KeepAlive = nil
	}
	return nil
}

func (h *WebSocketProxy) addUpstreams(d *caddyfile.Dispenser, addrs []string) error {
	for _, addr := range addrs {
		if _, err := parseUpstream(addr); err != nil {
			return d.WrapErr(err)
		}
		h.Upstreams = append(h.Upstreams, &Upstream{Dial: addr})
	}
	return nil
}

func (h *WebSocketProxy) parsePolicy(d *caddyfile.Dispenser) error {
	var name string
	if err := stringArg(d, &name); err != nil {
		return err
	}
	if name != "least_conn" && name != "round_robin" {
		return d.WrapErr(errPolicy(name))
	}
	h.LoadBalancing = &LoadBalancing{
		SelectionPolicyRaw: caddyconfig.JSON(map[string]string{"policy": name}, nil),
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
//	    orphan_timeout   <duration>
//	    shutdown_timeout <duration>
//	}
func (a *ConnectionRegistry) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the option's name
	if d.NextArg() {
		return d.Errf("connection_registry: surplus argument %q", d.Val())
	}
	durations := map[string]durationField{
		"orphan_timeout":   {&a.OrphanTimeout, false},
		"shutdown_timeout": {&a.ShutdownTimeout, false},
	}
	err := eachSubdirective(d, func(name string) (bool, error) {
		f, ok := durations[name]
		if !ok {
			return false, nil
		}
		return true, f.parse(d)
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
		return nil, d.Err("connection_registry: repeated")
	}
	a := new(ConnectionRegistry)
	if err := a.UnmarshalCaddyfile(d); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: "connection_registry", Value: caddyconfig.JSON(a, nil)}, nil
}

// eachSubdirective calls parse for every subdirective of a block. parse takes
// all arguments, and returns false for a name that it does not know. None may be
// there twice or have a block of its own.
func eachSubdirective(d *caddyfile.Dispenser, parse func(name string) (known bool, err error)) error {
	seen := make(map[string]bool)
	last := ""
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if name == "{" {
			return d.Errf("%s: surplus block", last)
		}
		last = name
		if seen[name] {
			return d.Errf("%s: repeated", name)
		}
		seen[name] = true
		known, err := parse(name)
		if err != nil {
			return err
		}
		if !known {
			return d.Errf("unrecognized subdirective %q", name)
		}
	}
	return nil
}

// durationField is a setting that is a duration, and whether `off` turns it off.
type durationField struct {
	to  **caddy.Duration
	off bool
}

// parse takes the one argument of a duration's subdirective.
func (f durationField) parse(d *caddyfile.Dispenser) error {
	name := d.Val()
	var arg string
	if err := stringArg(d, &arg); err != nil {
		return err
	}
	value := new(caddy.Duration)
	*f.to = value
	if arg == "off" && f.off {
		return nil
	}
	parsed, err := caddy.ParseDuration(arg)
	if err != nil {
		return d.Errf("%s: invalid duration %q", name, arg)
	}
	*value = caddy.Duration(parsed)
	return nil
}

// stringArg takes the one argument of a subdirective.
func stringArg(d *caddyfile.Dispenser, to *string) error {
	name := d.Val()
	args := d.RemainingArgs()
	switch len(args) {
	case 0:
		return d.Errf("%s: missing argument", name)
	case 1:
		*to = args[0]
		return nil
	default:
		return d.Errf("%s: surplus argument %q", name, args[1])
	}
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*WebSocketProxy)(nil)
	_ caddyfile.Unmarshaler = (*ConnectionRegistry)(nil)
)
