package holdfast

import (
	"fmt"
	"math"
	"reflect"
	"strconv"

	"github.com/dustin/go-humanize"

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
	h.Transport, h.KeepAlive, h.Resume, h.Replay = new(Transport), new(KeepAlive), new(Resume), new(Replay)
	fields := map[string]argument{
		"name":               stringField{&h.Name},
		"dial_timeout":       durationField{&h.Transport.DialTimeout, false},
		"handshake_timeout":  durationField{&h.Transport.HandshakeTimeout, false},
		"resume_timeout":     durationField{&h.Resume.Timeout, true},
		"resume_concurrency": countField{&h.Resume.Concurrency},
		"resume_limit":       countField{&h.Resume.Limit},
		"replay":             stringField{&h.Replay.Mode},
		"replay_buffer":      sizeField{&h.Replay.Buffer},
		"replay_overflow":    stringField{&h.Replay.Overflow},
		"drain_window":       durationField{&h.DrainWindow, false},
		"ping_interval":      durationField{&h.KeepAlive.PingInterval, true},
		"ping_timeout":       durationField{&h.KeepAlive.PingTimeout, false},
		"idle_timeout":       durationField{&h.KeepAlive.IdleTimeout, true},
		"first_data_timeout": durationField{&h.KeepAlive.FirstDataTimeout, true},
		"max_lifetime":       durationField{&h.KeepAlive.MaxLifetime, true},
		"write_timeout":      durationField{&h.KeepAlive.WriteTimeout, true},
		"compression":        stringField{&h.Compression},
	}
	err := eachSubdirective(d, func(name string) (bool, error) {
		if f, ok := fields[name]; ok {
			return true, oneArgument(d, f)
		}
		switch name {
		case "to":
			args := d.RemainingArgs()
			if len(args) == 0 {
				return true, d.Err("to: missing argument")
			}
			return true, h.addUpstreams(d, args)
		case "lb_policy":
			return true, h.parsePolicy(d)
		case "resume_interval":
			return true, h.parseInterval(d)
		case "resume_on":
			return true, h.parseCodes(d)
		}
		return false, nil
	})
	if err != nil {
		return err
	}
	if len(h.Upstreams) == 0 {
		return d.Err("websocket_proxy needs at least one upstream")
	}
	if _, err := deflate.ParseMode(h.Compression); err != nil {
		return d.Errf("compression: %w", err)
	}
	if err := h.live().Check(h.Transport); err != nil {
		return d.WrapErr(err)
	}
	h.Transport, h.KeepAlive = nilIfZero(h.Transport), nilIfZero(h.KeepAlive)
	h.Resume, h.Replay = nilIfZero(h.Resume), nilIfZero(h.Replay)
	return nil
}

// nilIfZero leaves a group out in which nothing is set.
func nilIfZero[T comparable](group *T) *T {
	var zero T
	if *group == zero {
		return nil
	}
	return group
}

// parseInterval takes the shortest and, if it is given, the longest pause.
func (h *WebSocketProxy) parseInterval(d *caddyfile.Dispenser) error {
	name, args := d.Val(), d.RemainingArgs()
	for i, to := range []**caddy.Duration{&h.Resume.MinInterval, &h.Resume.MaxInterval} {
		if i < len(args) {
			if err := (durationField{to, false}).parse(args[i]); err != nil {
				return d.Errf("%s: %w", name, err)
			}
		}
	}
	return argumentCount(d, name, args, 1, 2)
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
	return argumentCount(d, name, args, 1, len(args))
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
	if err := oneArgument(d, stringField{&name}); err != nil {
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
//	    replay_memory    <size>
//	}
func (a *ConnectionRegistry) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the option's name
	if d.NextArg() {
		return d.Errf("connection_registry: surplus argument %q", d.Val())
	}
	fields := map[string]argument{
		"orphan_timeout":   durationField{&a.OrphanTimeout, false},
		"shutdown_timeout": durationField{&a.ShutdownTimeout, false},
		"replay_memory":    sizeField{&a.ReplayMemory},
	}
	err := eachSubdirective(d, func(name string) (bool, error) {
		f, ok := fields[name]
		if !ok {
			return false, nil
		}
		return true, oneArgument(d, f)
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

// argument is a setting that is one argument.
type argument interface{ parse(arg string) error }

// durationField is a setting that is a duration, and whether `off` turns it off.
type durationField struct {
	to  **caddy.Duration
	off bool
}

func (f durationField) parse(arg string) error {
	if arg == "off" && f.off {
		*f.to = new(caddy.Duration)
		return nil
	}
	parsed, err := caddy.ParseDuration(arg)
	if err != nil {
		return fmt.Errorf("invalid duration %q", arg)
	}
	value := caddy.Duration(parsed)
	*f.to = &value
	return nil
}

// sizeField is a setting that is a size, like `5MiB`.
type sizeField struct{ to **int64 }

func (f sizeField) parse(arg string) error {
	parsed, err := humanize.ParseBytes(arg)
	if err != nil || parsed > math.MaxInt64 {
		return fmt.Errorf("invalid size %q", arg)
	}
	value := int64(parsed)
	*f.to = &value
	return nil
}

// countField is a setting that is a number.
type countField struct{ to **int }

func (f countField) parse(arg string) error {
	parsed, err := strconv.Atoi(arg)
	if err != nil {
		return fmt.Errorf("invalid number %q", arg)
	}
	*f.to = &parsed
	return nil
}

// stringField is a setting that is a word.
type stringField struct{ to *string }

func (f stringField) parse(arg string) error {
	if arg == "" { // which would mean unset
		return fmt.Errorf("invalid value %q", arg)
	}
	*f.to = arg
	return nil
}

// oneArgument takes the one argument of a subdirective.
func oneArgument(d *caddyfile.Dispenser, to argument) error {
	name, args := d.Val(), d.RemainingArgs()
	if err := argumentCount(d, name, args, 1, 1); err != nil {
		return err
	}
	if err := to.parse(args[0]); err != nil {
		return d.Errf("%s: %w", name, err)
	}
	return nil
}

// argumentCount refuses arguments that are missing, or too many.
func argumentCount(d *caddyfile.Dispenser, name string, args []string, least, most int) error {
	switch {
	case len(args) < least:
		return d.Errf("%s: missing argument", name)
	case len(args) > most:
		return d.Errf("%s: surplus argument %q", name, args[most])
	default:
		return nil
	}
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*WebSocketProxy)(nil)
	_ caddyfile.Unmarshaler = (*ConnectionRegistry)(nil)
)
