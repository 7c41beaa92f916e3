package holdfast

import (
	// One build of this module is enough: it brings caddy-l4's app, its listener
	// wrapper, and the matchers that passthrough routes are made of.
	_ "github.com/mholt/caddy-l4/layer4"
	_ "github.com/mholt/caddy-l4/modules/l4proxyprotocol"
	_ "github.com/mholt/caddy-l4/modules/l4tls"
	"github.com/pires/go-proxyproto"
)

// caddy-l4's proxy_protocol handler was written for a go-proxyproto whose default
// was to use a PROXY header that is there; since v0.15 the default is to refuse
// connections without one. caddy-l4 names no policy, so the old default is set
// here. Caddy's own listener wrapper always names one and is not concerned.
func init() { proxyproto.DefaultPolicy = proxyproto.USE }
