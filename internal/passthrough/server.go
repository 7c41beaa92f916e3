package passthrough

import (
	"cmp"
	"reflect"

	"github.com/mholt/caddy-l4/layer4"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// ListenerOf is the first address of the server that is being provisioned: of layer4,
// or of HTTP with layer4 as a listener wrapper. The latter is marked, as a site there may
// have the same address.
func ListenerOf(ctx caddy.Context) string {
	if srv, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server); ok {
		return "layer4/" + firstOr(srv.Listen, srv.Name())
	}
	for _, m := range ctx.Modules() {
		app, ok := m.(*layer4.App)
		if !ok {
			continue
		}
		for name, srv := range app.Servers {
			if beingProvisioned(srv) {
				return firstOr(srv.Listen, name)
			}
		}
	}
	return "layer4"
}

func firstOr(addresses []string, name string) string {
	if len(addresses) == 0 {
		return name
	}
	return cmp.Or(addresses[0], name)
}

// beingProvisioned reports whether it is a server's turn. caddy-l4 tells no handler on
// which server it is, but provisions one after the other: this one has parsed its
// addresses, and not compiled its routes. Both are unexported fields, which reflection
// may look at; a test says when they have changed.
func beingProvisioned(srv *layer4.Server) bool {
	v := reflect.ValueOf(srv).Elem()
	addresses, routes := v.FieldByName("listenAddrs"), v.FieldByName("compiledRoute")
	return addresses.Kind() == reflect.Slice && addresses.Len() > 0 && routes.Kind() == reflect.Interface && routes.IsNil()
}
