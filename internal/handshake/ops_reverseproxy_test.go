// This file compares header_up with that of the installed reverse_proxy, for random
// operations.

package handshake

import (
	"context"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http/httpguts"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// TestHeaderUpIsThatOfReverseProxy applies random operations, to requests that hold
// what could confuse them, at two upstreams each.
func TestHeaderUpIsThatOfReverseProxy(t *testing.T) {
	ctx, err := caddy.ProvisionContext(new(caddy.Config))
	if err != nil {
		t.Fatal(err)
	}
	changed, late, refused := 0, 0, 0
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 0))
		ops := randomOps(rng)
		h := up(t, *copyOps(ops))
		r := prepared(t, "GET /chat?x=%7Bopen%7D HTTP/1.1", "X-A: 1", "X-A: 2", "X-B: a{b}\\", "X-C: "+host, "X-Example: a1", "Cookie: c=1", "Origin: https://example.com")
		q, err := NewRequest(r, Client{ID: "id"}, deflate.Negotiation{}, h)
		if err == nil && q.late != nil {
			late++
		}
		for _, upstream := range []string{"127.0.0.1:1", "backend.example:8080"} {
			want, wantHost := reverseProxiedBy(t, ctx, copyOps(ops), upstream, r)
			dialed, errDial := q, err
			if err == nil {
				dialed, errDial = q.to(&Upstream{Network: "tcp", Address: upstream})
			}
			if !httpguts.ValidHostHeader(wantHost) && errDial != nil {
				refused++
				continue
			}
			if errDial != nil {
				t.Fatalf("seed %d: %s: %+v: %v", seed, upstream, *ops, errDial)
			}
			got, _ := sent(t, dialed)
			for name := range want {
				if ofUpgrade(name) || name == "Via" {
					delete(want, name)
				}
			}
			for name := range got.Header {
				if ofUpgrade(name) {
					got.Header.Del(name)
				}
			}
			if _, ok := want["X-B"]; !ok || len(want) != 10 {
				changed++
			}
			compareHeader(t, got.Header, want)
			if got.Host != wantHost {
				t.Errorf("Host: got %q, want %q", got.Host, wantHost)
			}
			if t.Failed() {
				t.Fatalf("seed %d: %s: %+v", seed, upstream, *ops)
			}
		}
	}
	if changed < 200 || late < 60 || late > 280 || refused > 120 {
		t.Errorf("got %d dials with changes, %d refused, %d requests with late ones: the test is void", changed, refused, late)
	}
}

// ofUpgrade reports whether a header is that of the handshake, which is not
// compared: reverse_proxy lets operations break it.
func ofUpgrade(name string) bool {
	name = http.CanonicalHeaderKey(name)
	return reserved(name) || name == "User-Agent"
}

// randomOps returns operations whose outcome does not depend on the order of a map.
func randomOps(rng *rand.Rand) *headers.HeaderOps {
	pick := func(from ...string) string { return from[rng.IntN(len(from))] }
	text := func() string {
		parts := []string{pick("x", "1", "a{b}", `\{y\}`, "{")}
		for range rng.IntN(3) {
			parts = append(parts, pick(
				"-", "}", `\`, "{http.request.header.X-B}", "{http.request.header.X-C}", "{http.request.uri.query.x}", "{http.request.host}",
				"{unknown}", host, hostport, port, address, `\`+host, "{open}", "{"+host, `{"k":"{http.request.host}"}`,
			))
		}
		return strings.Join(parts, "")
	}
	if rng.IntN(3) == 0 { // without any that are late
		late := text
		text = func() string { return strings.ReplaceAll(late(), "reverse_proxy.upstream", "other") }
	}
	ops := new(headers.HeaderOps)
	fields := func() http.Header {
		h := http.Header{}
		for range rng.IntN(3) {
			h[pick("X-A", "X-B", "X-D", "Origin", "X-{http.request.host.labels.1}")] = []string{text()}
		}
		return h
	}
	if rng.IntN(2) == 0 {
		ops.Add = fields()
		for name := range ops.Add {
			ops.Add[name] = append(ops.Add[name], text())
		}
	}
	if rng.IntN(2) == 0 {
		ops.Set = fields()
		if rng.IntN(2) == 0 {
			ops.Set["Host"] = []string{pick(hostport, host+":"+port, "inner.example", "{http.request.host}", "x."+host)}
		}
	}
	if rng.IntN(2) == 0 {
		ops.Delete = append(ops.Delete, pick("X-A", "x-*", "*-b", "*ook*", "*", "Host", "{http.request.header.X-None}X-C", "X-"+port))
	}
	replacement := func() headers.Replacement {
		if rng.IntN(2) == 0 {
			return headers.Replacement{Search: pick("1", "{", "a", host, `\{`), Replace: text()}
		}
		return headers.Replacement{SearchRegexp: pick("^.", "[0-9]{1,2}", host, "(a)"), Replace: pick("<$0>", text())}
	}
	switch rng.IntN(4) {
	case 0:
		ops.Replace = map[string][]headers.Replacement{"*": {replacement(), replacement()}}
	case 1:
		ops.Replace = map[string][]headers.Replacement{"X-A": {replacement(), replacement()}, "X-B": {replacement()}, "x-{http.request.host.labels.1}": {replacement()}}
	}
	return ops
}

// copyOps returns a copy that can be provisioned by itself.
func copyOps(ops *headers.HeaderOps) *headers.HeaderOps {
	return mapped(ops, func(text string) string { return text })
}

// directed is a transport that keeps the header and the host of a request.
type directed struct {
	header http.Header
	host   string
}

func (d *directed) RoundTrip(r *http.Request) (*http.Response, error) {
	d.header, d.host = make(http.Header), r.Host
	for name, values := range r.Header { // some are spelled in the field's own way
		d.header[http.CanonicalHeaderKey(name)] = slices.Clone(values)
	}
	if d.host == "" {
		d.host = r.URL.Host
	}
	return &http.Response{StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(""))}, nil
}

// reverseProxiedBy returns what reverse_proxy sends to an upstream.
func reverseProxiedBy(t *testing.T, ctx caddy.Context, ops *headers.HeaderOps, upstream string, r *http.Request) (http.Header, string) {
	t.Helper()
	transport := new(directed)
	h := &reverseproxy.Handler{
		Transport: transport, Upstreams: reverseproxy.UpstreamPool{{Dial: upstream}}, Headers: &headers.Handler{Request: ops},
	}
	if err := h.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = h.Cleanup() }()
	w := httptest.NewRecorder()
	r = caddyhttp.PrepareRequest(r.Clone(context.Background()), caddy.NewReplacer(), w, new(caddyhttp.Server))
	if err := h.ServeHTTP(w, r, nil); err != nil {
		t.Fatalf("reverse_proxy: %v", err)
	}
	return transport.header, transport.host
}
