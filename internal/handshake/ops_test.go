// This file tests header_up.

package handshake

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"testing"
	"weak"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// prepared is a request as Caddy gives it to a handler, with its replacer.
func prepared(t *testing.T, requestLine string, lines ...string) *http.Request {
	t.Helper()
	r := received(t, requestLine, lines...)
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), new(caddyhttp.Server))
}

// provisioned returns h, made ready.
func provisioned(t *testing.T, h *Headers) *Headers {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	if err := h.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	return h
}

// up is what changes requests only.
func up(t *testing.T, ops headers.HeaderOps) *Headers {
	t.Helper()
	return provisioned(t, &Headers{Request: &ops})
}

// admitted is NewRequest of a request that is no attack.
func admitted(t *testing.T, r *http.Request, h *Headers) *Request {
	t.Helper()
	q, err := NewRequest(r, Client{ID: "id", IP: "192.0.2.1"}, deflate.Negotiation{}, h)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// sentTo returns the request as a backend at that address gets it.
func sentTo(t *testing.T, q *Request, address string) *http.Request {
	t.Helper()
	dialed, err := q.to(&Upstream{Network: "tcp", Address: address})
	if err != nil {
		t.Fatal(err)
	}
	r, _ := sent(t, dialed)
	return r
}

const (
	hostport = "{http.reverse_proxy.upstream.hostport}"
	host     = "{http.reverse_proxy.upstream.host}"
	port     = "{http.reverse_proxy.upstream.port}"
	address  = "{http.reverse_proxy.upstream.address}"
)

func TestHostIsKeptUnlessHeaderUpChangesIt(t *testing.T) {
	for _, test := range []struct {
		name string
		ops  *headers.HeaderOps
		want string
	}{
		{"no operations", nil, "ws.example.com:8443"},
		{"others", &headers.HeaderOps{Set: http.Header{"X-A": {"1"}}}, "ws.example.com:8443"},
		{"others that depend on the upstream", &headers.HeaderOps{Set: http.Header{"X-A": {hostport}}}, "ws.example.com:8443"},
		{"set", &headers.HeaderOps{Set: http.Header{"host": {"inner.example"}}}, "inner.example"},
		{"of the request", &headers.HeaderOps{Set: http.Header{"Host": {"x.{http.request.host}"}}}, "x.ws.example.com"},
		{"the upstream's", &headers.HeaderOps{Set: http.Header{"Host": {hostport}}}, "10.0.0.1:8080"},
		{"of both", &headers.HeaderOps{Set: http.Header{"Host": {"{http.request.host}." + host}}}, "ws.example.com.10.0.0.1"},
		{"replaced", &headers.HeaderOps{Replace: map[string][]headers.Replacement{"Host": {{Search: "ws.", Replace: "wss."}}}}, "wss.example.com:8443"},
		{"removed", &headers.HeaderOps{Delete: []string{"Host"}}, "10.0.0.1:8080"},
		{"removed late", &headers.HeaderOps{Set: http.Header{"X-A": {host}}, Delete: []string{"h*"}}, "10.0.0.1:8080"},
	} {
		t.Run(test.name, func(t *testing.T) {
			q := admitted(t, prepared(t, get, "Host: ws.example.com:8443"), provisioned(t, &Headers{Request: test.ops}))
			for range 2 {
				if got := sentTo(t, q, "10.0.0.1:8080").Host; got != test.want {
					t.Errorf("got Host %q, want %q", got, test.want)
				}
			}
		})
	}
}

// An upstream's placeholders are those of the backend that is dialed; the request's
// those of the moment when the client arrived.
func TestEveryDialHasItsUpstreamsPlaceholders(t *testing.T) {
	h := up(t, headers.HeaderOps{
		Set: http.Header{"Host": {hostport}, "X-Host": {host + " of {http.request.header.X-Name}"}, "X-Static": {"{http.request.header.X-Name}"}},
		Add: http.Header{"X-Several": {"port " + port, address}},
	})
	r := prepared(t, get, "X-Name: first", "X-Several: mine")
	q := admitted(t, r, h)
	r.Header.Set("X-Name", "changed since")
	later := q.Redial(deflate.Agreement{}, "attempt=1, replayed=0, cause=1006")
	for _, dial := range []struct {
		q                             *Request
		address, host, several, asNet string
	}{
		{q, "10.0.0.1:8080", "10.0.0.1", "port 8080", "tcp/10.0.0.1:8080"},
		{later, "[2001:db8::1]:9090", "2001:db8::1", "port 9090", "tcp/[2001:db8::1]:9090"},
		{later.Redial(deflate.Agreement{}, "attempt=2, replayed=0, cause=1006"), "backend:80", "backend", "port 80", "tcp/backend:80"},
		{q, "10.0.0.1:8080", "10.0.0.1", "port 8080", "tcp/10.0.0.1:8080"},
	} {
		got := sentTo(t, dial.q, dial.address)
		if got.Host != dial.address {
			t.Errorf("%s: got Host %q", dial.address, got.Host)
		}
		for name, want := range map[string][]string{
			"X-Host": {dial.host + " of first"}, "X-Static": {"first"}, "X-Several": {"mine", dial.several, dial.asNet},
		} {
			if !slices.Equal(got.Header[name], want) {
				t.Errorf("%s: %s: got %q, want %q", dial.address, name, got.Header[name], want)
			}
		}
	}
	socket, err := admitted(t, r, up(t, headers.HeaderOps{Set: http.Header{"X-A": {address + " " + hostport + " " + host + " " + port}}})).
		to(&Upstream{Network: "unix", Address: "/run/a:1"})
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := sent(t, socket); got.Header.Get("X-A") != "unix//run/a:1 /run/a:1 /run/a:1 0" {
		t.Errorf("socket: got %q", got.Header.Get("X-A"))
	}
}

// What a client writes is text, even if it looks like a placeholder, or would make
// one together with what follows it.
func TestWhatClientsWriteIsNeverExpanded(t *testing.T) {
	for _, value := range []string{
		host, "{http.request.host}", "{open}", `\`, `\\`, `\{open\}`, "{", "}", `{"a":"\{"}`, "{{{" + host + "}}}",
		strings.Repeat("{", 200), "{http.reverse_proxy.upstream.", "{backslash}", "{env.PATH}",
	} {
		q := admitted(t, prepared(t, get, "X-Evil: "+value), up(t, headers.HeaderOps{
			Set: http.Header{"X-Copy": {"{http.request.header.X-Evil}" + port + "{http.request.header.X-Evil}host}"}},
		}))
		got := sentTo(t, q, "10.0.0.1:8080").Header
		if want := value + "8080" + value + "host}"; got.Get("X-Copy") != want {
			t.Errorf("%.40s: got %q, want %q", value, got.Get("X-Copy"), want)
		}
		if got.Get("X-Evil") != value {
			t.Errorf("%.40s: got the client's own as %q", value, got.Get("X-Evil"))
		}
	}
}

// Operations can neither remove nor forge what the handshake consists of.
func TestTheHandshakesOwnHeadersStay(t *testing.T) {
	own := []string{
		"Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Sec-WebSocket-Extensions", "Holdfast-Connection",
		"Holdfast-Resume", "holdfast_other", "Content-Length", "Transfer-Encoding", "Trailer",
	}
	forge, remove := headers.HeaderOps{Set: http.Header{}, Add: http.Header{}}, headers.HeaderOps{}
	for _, name := range own {
		forge.Set[name], forge.Add[name] = []string{"5"}, []string{"chunked"}
		remove.Delete = append(remove.Delete, name)
	}
	for _, late := range []bool{false, true} {
		for name, ops := range map[string]headers.HeaderOps{
			"forge": forge, "remove": remove, "remove all": {Delete: []string{"*"}},
			"replace": {Replace: map[string][]headers.Replacement{"*": {{SearchRegexp: ".+", Replace: "x"}}}},
		} {
			if late {
				ops.Set = ops.Set.Clone()
				if ops.Set == nil {
					ops.Set = http.Header{}
				}
				ops.Set.Set("X-Late", host)
			}
			t.Run(fmt.Sprintf("%s/late=%t", name, late), func(t *testing.T) {
				r := prepared(t, get, "Sec-WebSocket-Extensions: permessage-deflate")
				offer := deflate.Negotiate(r.Header["Sec-Websocket-Extensions"], deflate.On)
				q, err := NewRequest(r, Client{ID: "id"}, offer, up(t, ops))
				if err != nil {
					t.Fatal(err)
				}
				got := sentTo(t, q, "10.0.0.1:8080")
				want := http.Header{
					"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Key": {sampleKey}, "Sec-Websocket-Version": {"13"},
					"Sec-Websocket-Extensions": {"permessage-deflate; client_no_context_takeover"}, "Holdfast-Connection": {"id"},
				}
				for _, name := range own {
					name = http.CanonicalHeaderKey(name)
					if !slices.Equal(got.Header[name], want[name]) {
						t.Errorf("%s: got %q, want %q", name, got.Header[name], want[name])
					}
				}
				if got.ContentLength != 0 || len(got.TransferEncoding) > 0 || len(got.Trailer) > 0 {
					t.Errorf("got a body declared: %d, %q, %v", got.ContentLength, got.TransferEncoding, got.Trailer)
				}
			})
		}
	}
}

// What is offered is what header_up makes of the client's offer, and a backend may
// choose from that.
func TestHeaderUpChangesTheSubprotocolsOffered(t *testing.T) {
	for _, value := range []string{"mqtt", "mqtt, " + port} {
		q := admitted(t, prepared(t, get, "Sec-WebSocket-Protocol: chat"), up(t, headers.HeaderOps{Set: http.Header{"Sec-WebSocket-Protocol": {value}}}))
		if res, err := q.Do(&scripted{script: switching("Sec-WebSocket-Protocol: mqtt")}, testUpstream); err != nil || res.Subprotocol != "mqtt" {
			t.Errorf("%s: got %v, want mqtt agreed", value, err)
		}
		if _, err := q.Do(&scripted{script: switching("Sec-WebSocket-Protocol: chat")}, testUpstream); err == nil {
			t.Errorf("%s: got chat agreed, which was not offered", value)
		}
	}
}

func TestDefaultOrigin(t *testing.T) {
	const none = "\x00"
	for _, test := range []struct {
		name, configured string
		lines            []string
		ops              *headers.HeaderOps
		want             string
	}{
		{"client without one", "https://default.example", nil, nil, "https://default.example"},
		{"client with its own", "https://default.example", []string{"Origin: https://own.example"}, nil, "https://own.example"},
		{"client that nominates its own as of one hop", "https://default.example", []string{"Origin: https://own.example", "Connection: Upgrade, Origin"}, nil, none},
		{"not configured", "", nil, nil, none},
		{"null", "null", nil, nil, "null"},
		{"placeholder", "https://{http.request.host}", nil, nil, "https://example.com"},
		{"header_up sees it", "https://default.example", nil, &headers.HeaderOps{Replace: map[string][]headers.Replacement{"Origin": {{Search: "https", Replace: "http"}}}}, "http://default.example"},
		{"header_up sees it late", "https://default.example", nil, &headers.HeaderOps{Replace: map[string][]headers.Replacement{"Origin": {{Search: "default", Replace: host}}}}, "https://10.0.0.1.example"},
		{"header_up replaces it", "https://default.example", nil, &headers.HeaderOps{Set: http.Header{"Origin": {"http://" + hostport}}}, "http://10.0.0.1:8080"},
		{"header_up removes it", "https://default.example", nil, &headers.HeaderOps{Delete: []string{"Origin"}}, none},
		{"a line of another's making", "https://{http.request.uri.query.o}", nil, nil, none},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := provisioned(t, &Headers{Request: test.ops, DefaultOrigin: test.configured})
			q := admitted(t, prepared(t, "GET /?o=x%0d%0aX-Injected:1 HTTP/1.1", test.lines...), h)
			got, ok := sentTo(t, q, "10.0.0.1:8080").Header["Origin"]
			if test.want == none && ok || test.want != none && !slices.Equal(got, []string{test.want}) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// Neither the request nor what hangs on it is kept, and what every connection would
// have alike it shares.
func TestNothingOfTheRequestIsKept(t *testing.T) {
	for name, ops := range map[string]headers.HeaderOps{
		"early":            {Set: http.Header{"X-A": {"{http.request.uri}"}}},
		"late":             {Set: http.Header{"X-A": {hostport}}},
		"late and its own": {Set: http.Header{"X-A": {hostport + "{http.request.uri}"}, "X-B": {"{http.request.header.Cookie}"}}},
	} {
		t.Run(name, func(t *testing.T) {
			h := up(t, ops)
			var q *Request
			request, url, repl := func() (weak.Pointer[http.Request], weak.Pointer[url.URL], weak.Pointer[caddy.Replacer]) {
				r := prepared(t, get, "Cookie: a=1")
				q = admitted(t, r, h)
				return weak.Make(r), weak.Make(r.URL), weak.Make(replacer(r))
			}()
			for range 5 {
				runtime.GC()
			}
			if request.Value() != nil || url.Value() != nil || repl.Value() != nil {
				t.Errorf("got kept: request %t, its URL %t, its replacer %t", request.Value() != nil, url.Value() != nil, repl.Value() != nil)
			}
			if own := q.late != nil && (h.late == nil || q.late != h.late.common); own != (name == "late and its own") {
				t.Errorf("got operations of its own: %t", own)
			}
			runtime.KeepAlive(q)
		})
	}
}
