package selection

import (
	"encoding/json"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// ParseCaddyfile parses a policy; d is at the subdirective's name. Syntax:
//
//	lb_policy <name> [<options...>]
//
// It returns what Load takes.
func ParseCaddyfile(d *caddyfile.Dispenser) (json.RawMessage, error) {
	if !d.NextArg() {
		return nil, d.Err("lb_policy: missing argument")
	}
	raw, err := parse(d)
	if err != nil {
		return nil, err
	}
	if err := checkFallbacks(raw, true); err != nil {
		return nil, d.WrapErr(err)
	}
	return raw, nil
}

// parse parses the policy whose name d is at. Caddy does so, too, but takes no
// notice of what a policy leaves over.
func parse(d *caddyfile.Dispenser) (json.RawMessage, error) {
	name := d.Val()
	info, err := caddy.GetModule(namespace + "." + name)
	if err != nil {
		return nil, d.WrapErr(errUnknown(name))
	}
	mod := info.New()
	policy, ok := mod.(caddyfile.Unmarshaler)
	if _, selects := mod.(reverseproxy.Selector); !ok || !selects {
		return nil, d.Errf("lb_policy %q cannot be used in a Caddyfile: it is a %T", name, mod)
	}
	segment := d.NewFromNextSegment()
	switch mod.(type) {
	case *reverseproxy.QueryHashSelection, *reverseproxy.HeaderHashSelection, *reverseproxy.CookieHashSelection:
		if err := parseFallback(segment); err != nil {
			return nil, err
		}
	}
	if err := policy.UnmarshalCaddyfile(segment); err != nil {
		return nil, fmt.Errorf("lb_policy %q: %w", name, err)
	}
	if segment.Line() == 0 { // a policy without options need not look at anything
		segment.Next()
	}
	if args := segment.RemainingArgs(); len(args) > 0 {
		return nil, segment.Errf("lb_policy %q: surplus argument %q", name, args[0])
	}
	if segment.Next() {
		return nil, segment.Errf("lb_policy %q: surplus block", name)
	}
	return caddyconfig.JSONModuleObject(mod, "policy", name, nil), nil
}

// parseFallback parses the fallback in a policy's segment only for its errors; the
// policy parses it again.
func parseFallback(segment *caddyfile.Dispenser) error {
	defer segment.Reset()
	segment.RemainingArgs() // the policy's name is the first
	for segment.NextBlock(0) {
		if segment.Val() == "fallback" && segment.NextArg() {
			if _, err := parse(segment); err != nil {
				return err
			}
		}
	}
	return nil
}
