// This file tests that header_up follows a connection from backend to backend.

package opening

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// Each backend sees its own address in what header_up sets, from the first dial on,
// and the client's values as they were when it arrived.
func TestHeaderUpAtEveryDial(t *testing.T) {
	backends := map[string]*backend{"a": {status: http.StatusServiceUnavailable}, "b": accepting(), "c": accepting()}
	reg := registry.New()
	p := &testPool{route: reg.Retain(registry.WebSocket, "route"), backends: backends, names: []string{"a", "b"}, concurrency: 64}
	o := New(t.Context())
	if err := o.Admit(reg, p.route, registry.Info{Kind: registry.WebSocket}); err != nil {
		t.Fatal(err)
	}
	defer o.Close()

	h := &handshake.Headers{Request: &headers.HeaderOps{Set: http.Header{
		"Host": {"{http.reverse_proxy.upstream.hostport}"}, "X-Via": {"{name} to {http.reverse_proxy.upstream.address}"},
	}}}
	if err := h.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	r := clientRequest(t)
	repl := caddy.NewReplacer()
	repl.Set("name", "{http.reverse_proxy.upstream.host}")
	r = r.WithContext(context.WithValue(r.Context(), caddy.ReplacerCtxKey, repl))
	q, err := handshake.NewRequest(r, handshake.Client{ID: o.ID()}, deflate.Negotiation{}, h)
	if err != nil {
		t.Fatal(err)
	}
	repl.Set("name", "changed since")

	a, err := o.Reach(p.Redial(q, nil, pool.Opening, ""), q)
	if err != nil {
		t.Fatal(err)
	}
	defer a.conn.Close()
	p.names = []string{"c"}
	found, err := newLine(o.rec, p, a, nil).Search(session.Interruption{Upstream: "b"})(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found.Discard()
	for name, b := range backends {
		if len(b.requests) != 1 {
			t.Fatalf("%s: got %d requests, want one", name, len(b.requests))
		}
		got := b.requests[0]
		if want := name + ".test:80"; got.Host != want {
			t.Errorf("%s: got Host %q, want %q", name, got.Host, want)
		}
		if want := "{http.reverse_proxy.upstream.host} to tcp/" + name + ".test:80"; got.Header.Get("X-Via") != want {
			t.Errorf("%s: got X-Via %q, want %q", name, got.Header.Get("X-Via"), want)
		}
	}
}

// What header_down sets reaches the client with a relayed refusal.
func TestHeaderDownOfARefusal(t *testing.T) {
	reg := registry.New()
	p := &testPool{
		route: reg.Retain(registry.WebSocket, "route"), backends: map[string]*backend{"a": {status: http.StatusForbidden}}, names: []string{"a"}, concurrency: 64,
	}
	o := admit(t, reg, p)
	defer o.Close()
	a := reach(t, o, p)
	h := &handshake.Headers{Response: &headers.RespHeaderOps{HeaderOps: &headers.HeaderOps{
		Set: http.Header{"X-From": {"{http.reverse_proxy.upstream.hostport} {http.reverse_proxy.status_code}"}},
	}}}
	w := httptest.NewRecorder()
	a.Relay(o, w, h.Down(clientRequest(t)))
	if w.Code != http.StatusForbidden || w.Header().Get("X-From") != "a.test:80 403" {
		t.Errorf("got %d with X-From %q, want 403 with the upstream's address and status", w.Code, w.Header().Get("X-From"))
	}
}
