// This file compares the X-Forwarded-* headers with those of the installed
// reverse_proxy, for every combination of what a request may bring.

package handshake

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// recorder is a transport that keeps the request's header.
type recorder struct{ got http.Header }

func (t *recorder) RoundTrip(r *http.Request) (*http.Response, error) {
	t.got = r.Header.Clone()
	return &http.Response{StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(""))}, nil
}

func TestForwardedHeadersAreThoseOfReverseProxy(t *testing.T) {
	ctx, err := caddy.ProvisionContext(new(caddy.Config))
	if err != nil {
		t.Fatal(err)
	}
	transport := new(recorder)
	theirs := &reverseproxy.Handler{Transport: transport, Upstreams: reverseproxy.UpstreamPool{{Dial: "127.0.0.1:1"}}}
	if err := theirs.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = theirs.Cleanup() })

	// none is no such field, as opposed to an empty one.
	none := []string(nil)
	fors := [][]string{none, {""}, {"10.0.0.1"}, {"10.0.0.1, 10.0.0.2"}, {"10.0.0.1", "10.0.0.2"}, {"unknown"}}
	protos := [][]string{none, {""}, {"https"}, {"wss", "https"}, {"https", ""}}
	hosts := [][]string{none, {""}, {"outer.example"}, {"a.example", "b.example"}, {"a.example", ""}}
	remotes := []string{"192.0.2.1:1234", "[2001:db8::1]:1234", "[fe80::1%eth0]:1234", "@", "", "garbage"}
	cases := 0
	for _, remote := range remotes {
		for _, secure := range []bool{false, true} {
			for _, trusted := range []bool{false, true} {
				if trusted && remote != "@" && !strings.Contains(remote, ":") {
					continue // Caddy never trusts who has no address, unless on a Unix socket
				}
				for _, xff := range fors {
					for _, proto := range protos {
						for _, host := range hosts {
							cases++
							r := received(t, get)
							r.RemoteAddr = remote
							if secure {
								r.TLS = &tls.ConnectionState{HandshakeComplete: true}
							}
							for name, v := range map[string][]string{"X-Forwarded-For": xff, "X-Forwarded-Proto": proto, "X-Forwarded-Host": host} {
								if v != nil {
									r.Header[name] = slices.Clone(v)
								}
							}
							got, _ := sent(t, newRequest(t, r, "id", trusted, deflate.Negotiation{}))
							want := reverseProxied(t, theirs, transport, r, trusted)
							for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"} {
								if !slices.Equal(got.Header[name], want[name]) {
									t.Errorf("%s: %s: got %q, want %q", describe(r, trusted), name, got.Header[name], want[name])
								}
							}
						}
					}
				}
			}
		}
	}
	if cases < 1000 {
		t.Errorf("got %d cases compared, want more: the test is void", cases)
	}
}

// reverseProxied returns the headers that reverse_proxy sends for r.
func reverseProxied(t *testing.T, h *reverseproxy.Handler, transport *recorder, r *http.Request, trusted bool) http.Header {
	t.Helper()
	w := httptest.NewRecorder()
	r = caddyhttp.PrepareRequest(r.Clone(context.Background()), caddy.NewReplacer(), w, new(caddyhttp.Server))
	caddyhttp.SetVar(r.Context(), caddyhttp.TrustedProxyVarKey, trusted)
	transport.got = nil
	if err := h.ServeHTTP(w, r, nil); err != nil {
		t.Fatalf("reverse_proxy: %v", err)
	}
	if transport.got == nil {
		t.Fatal("reverse_proxy sent nothing: the test is void")
	}
	return transport.got
}

func describe(r *http.Request, trusted bool) string {
	return fmt.Sprintf("remote %q, trusted %t, for %q, proto %q, host %q", r.RemoteAddr, trusted,
		r.Header["X-Forwarded-For"], r.Header["X-Forwarded-Proto"], r.Header["X-Forwarded-Host"])
}
