package selection

import (
	"context"
	"net"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// noServer stands for the server of requests that came to none. All requests
// share it; nothing sets it up or shuts it down.
var noServer = new(caddyhttp.Server)

// Prepare returns r, which was made again from what is kept of a client's
// request, with what policies and dynamic sources take for granted in the context
// of a request that came through Caddy: a replacer, the variables client_ip and
// trusted_proxy, a server and a local address, which is :0 unless r's context has
// one. Variables that handlers had set are gone.
//
// Of r itself Method, URL, Header and Host must be set, and for policies of Caddy
// also RequestURI (uri_hash), RemoteAddr (ip_hash) and, if the client came by TLS,
// TLS (cookie: whether it is secure), with HandshakeComplete, without which
// placeholders have no remote address.
func Prepare(r *http.Request, clientIP string, trusted bool) *http.Request {
	if ctx := r.Context(); ctx.Value(http.LocalAddrContextKey) == nil {
		// Without it, the placeholder {http.request.local} panics.
		r = r.WithContext(context.WithValue(ctx, http.LocalAddrContextKey, new(net.TCPAddr)))
	}
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, noServer)
	caddyhttp.SetVar(r.Context(), caddyhttp.ClientIPVarKey, clientIP)
	caddyhttp.SetVar(r.Context(), caddyhttp.TrustedProxyVarKey, trusted)
	return r
}
