// This file tests that policies and dynamic sources can do with a request that was
// made again.

package selection

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// stored is a request as it is made for a re-dial.
func stored(t *testing.T) *http.Request {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(
		"GET /rooms/7?user=ann HTTP/1.1\r\nHost: 127.0.0.9:8080\r\nCookie: a=b\r\n\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestPoliciesTakeAPreparedRequest(t *testing.T) {
	for name, raw := range every {
		t.Run(name, func(t *testing.T) {
			newRig(t, raw, 4).connect(Prepare(stored(t), "192.0.2.1", true))
		})
	}
}

func TestPrepareSetsWhatItIsTold(t *testing.T) {
	r := Prepare(stored(t), "192.0.2.7", true)
	if got := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey); got != "192.0.2.7" {
		t.Errorf("got client_ip %v, want 192.0.2.7", got)
	}
	if got := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey); got != true {
		t.Errorf("got trusted_proxy %v, want true", got)
	}
	other := Prepare(stored(t), "", false)
	if got := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey); got != "192.0.2.7" || other.Context() == r.Context() {
		t.Errorf("got client_ip %v after another request, want 192.0.2.7", got)
	}
}

func TestDynamicSourceTakesAPreparedRequest(t *testing.T) {
	mod, err := testContext(t).LoadModuleByID("http.reverse_proxy.upstreams.a",
		json.RawMessage(`{"name":"{http.request.host}","port":"{http.request.uri.query.port}{http.request.port}"}`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := mod.(reverseproxy.UpstreamSource).GetUpstreams(Prepare(stored(t), "192.0.2.1", false))
	if err != nil || len(got) != 1 || got[0].Dial != "127.0.0.9:8080" {
		t.Errorf("got upstreams %v and error %v, want 127.0.0.9:8080", got, err)
	}
}

// A placeholder must not panic, whatever a source or an upstream's address uses.
func TestPlaceholdersOfAPreparedRequest(t *testing.T) {
	for key, want := range map[string]string{
		"http.request.method":           "GET",
		"http.request.scheme":           "http",
		"http.request.proto":            "HTTP/1.1",
		"http.request.host":             "127.0.0.9",
		"http.request.hostport":         "127.0.0.9:8080",
		"http.request.port":             "8080",
		"http.request.local":            ":0",
		"http.request.local.host":       "",
		"http.request.local.port":       "0",
		"http.request.remote":           "",
		"http.request.remote.host":      "",
		"http.request.remote.host/24":   "",
		"http.request.remote.port":      "",
		"http.request.uri":              "/rooms/7?user=ann",
		"http.request.uri.path.1":       "7",
		"http.request.uri.query.user":   "ann",
		"http.request.orig_uri":         "/rooms/7?user=ann",
		"http.request.orig_uri.path.0":  "rooms",
		"http.request.orig_method":      "GET",
		"http.request.header.Cookie":    "a=b",
		"http.request.cookie.a":         "b",
		"http.request.tls.server_name":  "",
		"http.request.tls.client.san":   "",
		"http.request.body":             "",
		"http.vars.client_ip":           "192.0.2.1",
		"http.vars.other":               "",
		"http.response.header.X":        "",
		"http.shutting_down":            "false",
		"http.time_until_shutdown":      "",
		"http.request.host.labels.0":    "9",
		"http.request.uri.path.file":    "7",
		"http.request.uri.query":        "user=ann",
		"http.request.uri_escaped":      "%2Frooms%2F7%3Fuser%3Dann",
		"http.request.orig_uri.query":   "user=ann",
		"http.request.orig_uri.path":    "/rooms/7",
		"http.request.uri.path.dir":     "/rooms/",
		"http.request.uri.path":         "/rooms/7",
		"http.request.tls.client.issue": "",
	} {
		t.Run(key, func(t *testing.T) {
			r := Prepare(stored(t), "192.0.2.1", false)
			repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
			if got := repl.ReplaceAll("{"+key+"}", ""); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
	for _, key := range []string{"http.request.uuid", "http.request.duration", "http.request.duration_ms"} {
		r := Prepare(stored(t), "192.0.2.1", false)
		repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
		if got := repl.ReplaceAll("{"+key+"}", ""); got == "" {
			t.Errorf("%s: got nothing, want a value", key)
		}
	}
}

func TestPrepareKeepsTheLocalAddress(t *testing.T) {
	local := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 80), Port: 443}
	r := stored(t)
	r = Prepare(r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local)), "192.0.2.1", false)
	repl := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if got := repl.ReplaceAll("{http.request.local}", ""); got != "192.0.2.80:443" {
		t.Errorf("got %q, want 192.0.2.80:443", got)
	}
}
