package pool

import (
	"encoding/json"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// ParseDynamic takes a module that finds upstreams.
func ParseDynamic(d *caddyfile.Dispenser) (json.RawMessage, error) {
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
