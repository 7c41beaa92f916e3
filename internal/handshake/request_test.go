// This file tests what goes to a backend.

package handshake

import (
	"bufio"
	"crypto/tls"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// sent returns the request as a backend gets it, and its bytes.
func sent(t *testing.T, q *Request) (*http.Request, string) {
	t.Helper()
	raw := string(q.wire(sampleKey))
	br := bufio.NewReader(strings.NewReader(raw))
	r, err := http.ReadRequest(br)
	if err != nil {
		t.Fatalf("the request is no HTTP: %v:\n%s", err, raw)
	}
	if n := br.Buffered(); n > 0 {
		t.Fatalf("got %d bytes after the request's header, want none:\n%s", n, raw)
	}
	return r, raw
}

func TestNewRequestKeepsWhatIsForTheBackend(t *testing.T) {
	r := received(t, "GET /a%2Fb/c%20d?x=1&y=%0d%0a HTTP/1.1",
		"Host: ws.example.com:8443", "Cookie: a=1", "Cookie: b=2", "Authorization: Bearer abc",
		"Origin: https://example.com", "User-Agent: test", "X-Several: 1", "X-Several: 2", "X-Empty: ",
		"Sec-WebSocket-Protocol: chat, superchat", "Sec-WebSocket-Extensions: x-webkit-deflate-frame")
	r.Header["X-Empty"] = []string{""}
	got, raw := sent(t, newRequest(t, r, "id-1", false, deflate.Negotiation{}))
	if got.Method != http.MethodGet || got.RequestURI != "/a%2Fb/c%20d?x=1&y=%0d%0a" || got.Proto != "HTTP/1.1" {
		t.Errorf("got %s %s %s, want the client's path and query as they were", got.Method, got.RequestURI, got.Proto)
	}
	if got.Host != "ws.example.com:8443" {
		t.Errorf("got Host %q, want the client's", got.Host)
	}
	want := http.Header{
		"Cookie": {"a=1", "b=2"}, "Authorization": {"Bearer abc"}, "Origin": {"https://example.com"},
		"User-Agent": {"test"}, "X-Several": {"1", "2"}, "X-Empty": {""},
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {sampleKey},
		"Sec-Websocket-Protocol": {"chat, superchat"},
		"Holdfast-Connection":    {"id-1"},
		"X-Forwarded-For":        {"192.0.2.1"}, "X-Forwarded-Proto": {"http"}, "X-Forwarded-Host": {"ws.example.com:8443"},
	}
	compareHeader(t, got.Header, want)
	for _, spelled := range []string{
		"\r\nHost: ws.example.com:8443\r\n", "\r\nSec-WebSocket-Protocol: chat, superchat\r\n",
		"\r\nSec-WebSocket-Key: ", "\r\nSec-WebSocket-Version: 13\r\n", "\r\nUpgrade: websocket\r\n", "\r\nConnection: Upgrade\r\n",
	} {
		if strings.Count(raw, spelled) != 1 {
			t.Errorf("got the line %q %d times, want once:\n%s", spelled, strings.Count(raw, spelled), raw)
		}
	}
}

func compareHeader(t *testing.T, got, want http.Header) {
	t.Helper()
	for name := range want {
		if !slices.Equal(got[name], want[name]) {
			t.Errorf("%s: got %q, want %q", name, got[name], want[name])
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: got %q, want no such field", name, got[name])
		}
	}
}

func TestNewRequestLeavesTheClientsAlone(t *testing.T) {
	r := received(t, get, "Connection: upgrade, X-Hop", "X-Hop: 1", "Holdfast-Connection: forged", "X-Forwarded-For: 10.0.0.1")
	before := r.Header.Clone()
	newRequest(t, r, "id", false, deflate.Negotiation{})
	compareHeader(t, r.Header, before)
}

func TestNewRequestRemovesWhatIsNotForTheBackend(t *testing.T) {
	r := received(t, get,
		"Connection: keep-alive, upgrade , X-Hop,,x-other-hop", "Connection: X-Third",
		"X-Hop: 1", "X-Other-Hop: 2", "X-Third: 3", "Keep-Alive: 300", "Proxy-Connection: keep-alive",
		"Proxy-Authorization: Basic abc", "Proxy-Authenticate: Basic", "Te: trailers", "Trailer: X", "Alt-Svc: h3",
		"Content-Length: 0", "Holdfast-Connection: forged", "holdfast-resume: attempt=1", "HOLDFAST-X: 1",
		"X-Kept: yes")
	got, _ := sent(t, newRequest(t, r, "id-2", false, deflate.Negotiation{}))
	for _, name := range []string{
		"X-Hop", "X-Other-Hop", "X-Third", "Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "Proxy-Authenticate",
		"Te", "Trailer", "Alt-Svc", "Content-Length", "Holdfast-Resume", "Holdfast-X",
	} {
		if v, ok := got.Header[name]; ok {
			t.Errorf("%s: got %q, want it removed", name, v)
		}
	}
	if v := got.Header["Holdfast-Connection"]; !slices.Equal(v, []string{"id-2"}) {
		t.Errorf("got Holdfast-Connection %q, want the proxy's own only", v)
	}
	if v := got.Header["Connection"]; !slices.Equal(v, []string{"Upgrade"}) {
		t.Errorf("got Connection %q, want the proxy's own only", v)
	}
	if got.Header.Get("X-Kept") != "yes" {
		t.Error("got X-Kept removed, want it kept")
	}
}

// What the client nominates cannot take away what the proxy says of itself.
func TestNominatedHeadersDoNotTouchTheProxysOwn(t *testing.T) {
	r := received(t, get, "Connection: Upgrade, Host, Upgrade, Sec-WebSocket-Key, Sec-WebSocket-Version, X-Forwarded-For, "+
		"X-Forwarded-Proto, X-Forwarded-Host, Holdfast-Connection, Connection")
	got, _ := sent(t, newRequest(t, r, "id-3", false, deflate.Negotiation{}))
	compareHeader(t, got.Header, http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {sampleKey},
		"Holdfast-Connection": {"id-3"},
		"X-Forwarded-For":     {"192.0.2.1"}, "X-Forwarded-Proto": {"http"}, "X-Forwarded-Host": {"example.com"},
	})
}

func TestEveryDialHasItsOwnKeyAndOffer(t *testing.T) {
	r := received(t, get, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
	q := newRequest(t, r, "id", false, deflate.Negotiate(r.Header["Sec-Websocket-Extensions"], deflate.On))
	got, raw := sent(t, q)
	if want := "permessage-deflate; client_no_context_takeover"; got.Header.Get("Sec-Websocket-Extensions") != want {
		t.Errorf("got offer %q, want %q", got.Header.Get("Sec-Websocket-Extensions"), want)
	}
	if !strings.Contains(raw, "\r\nSec-WebSocket-Extensions: ") {
		t.Errorf("got another spelling of Sec-WebSocket-Extensions:\n%s", raw)
	}
	if again := string(q.wire(sampleKey)); again != raw {
		t.Errorf("got another request the second time:\n%s\nwant\n%s", again, raw)
	}
}

// net/http refuses these at its door, but handlers before this one set headers
// from placeholders, which may hold what a client wrote.
func TestNothingBreaksOutOfItsLine(t *testing.T) {
	const evil = "x\r\nX-Injected: 1\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: y"
	for _, test := range []struct {
		name    string
		set     func(r *http.Request)
		refused bool
	}{
		{"value", func(r *http.Request) { r.Header["X-Value"] = []string{evil} }, false},
		{"value with a line feed", func(r *http.Request) { r.Header["X-Value"] = []string{"x\nX-Injected: 1"} }, false},
		{"name", func(r *http.Request) { r.Header["X: 1\r\nX-Injected"] = []string{"1"} }, false},
		{"name with a colon", func(r *http.Request) { r.Header["X-Injected: 1\r\nX"] = []string{"1"} }, false},
		{"subprotocol", func(r *http.Request) { r.Header["Sec-Websocket-Protocol"] = []string{evil} }, false},
		{"forwarded host", func(r *http.Request) { r.Header["X-Forwarded-Host"] = []string{evil} }, false},
		{"forwarded for", func(r *http.Request) { r.Header["X-Forwarded-For"] = []string{evil} }, false},
		{"remote address", func(r *http.Request) { r.RemoteAddr = "[" + evil + "]:1" }, false},
		{"host", func(r *http.Request) { r.Host = evil }, true},
		{"host with a line feed", func(r *http.Request) { r.Host = "x\nX-Injected: 1" }, true},
		{"path", func(r *http.Request) { r.URL = &url.URL{Path: "/" + evil} }, false},
		{"query", func(r *http.Request) { r.URL = &url.URL{Path: "/", RawQuery: evil} }, true},
		{"opaque", func(r *http.Request) { r.URL = &url.URL{Opaque: "/ HTTP/1.1\r\nX-Injected: 1\r\nX: "} }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, trusted := range []bool{false, true} {
				r := received(t, get)
				test.set(r)
				q, err := NewRequest(r, Client{ID: "id", Trusted: trusted}, deflate.Negotiation{}, nil)
				if (err != nil) != test.refused {
					t.Fatalf("error: got %v, want one: %t", err, test.refused)
				}
				if err != nil {
					continue
				}
				raw := string(q.wire(sampleKey))
				if strings.Contains(raw, "\nX-Injected:") {
					t.Errorf("got a line of another's making:\n%s", raw)
					continue
				}
				got, _ := sent(t, q)
				if got.Header.Get("Upgrade") != "websocket" {
					t.Errorf("got no upgrade any more:\n%s", raw)
				}
			}
		})
	}
}

func TestRequestURI(t *testing.T) {
	for _, test := range []struct{ target, want string }{
		{"/", "/"},
		{"/?", "/?"},
		{"/a//b/../c", "/a//b/../c"},
		{"/%E2%82%AC?q=%20", "/%E2%82%AC?q=%20"},
		{"http://example.com/absolute?x", "/absolute?x"},
		{"http://example.com", "/"},
		{"//evil.example/x", "//evil.example/x"},
	} {
		got, _ := sent(t, newRequest(t, received(t, "GET "+test.target+" HTTP/1.1"), "id", false, deflate.Negotiation{}))
		if got.RequestURI != test.want {
			t.Errorf("%s: got request line with %q, want %q", test.target, got.RequestURI, test.want)
		}
	}
}

// Whatever a client or a rewrite makes of the target, what is accepted can be read again
// for a re-dial, and the rest is refused.
func TestRequestTargets(t *testing.T) {
	targets := map[string]bool{"x:y": false, "x:/y": true, "x:?y": true, "*": false, "//": true, "/?%zz#": true, "/;:@": true}
	rewrites := map[string]bool{"y": false, "1:2": false, "://y": false, "*": false, "": true, "/%zz": true, "//[": true, "/\xff": true}
	check := func(r *http.Request, what string, want bool) {
		t.Helper()
		q, err := NewRequest(r, Client{ID: "id"}, deflate.Negotiation{}, nil)
		if got := err == nil; got != want {
			t.Errorf("%s: got %q accepted: %t (%v), want %t", what, r.URL.RequestURI(), got, err, want)
		}
		if err != nil {
			return
		}
		again, err := q.HTTP()
		if err != nil || again.RequestURI != r.URL.RequestURI() {
			t.Errorf("%s: got %v, %v read again, want %q", what, again, err, r.URL.RequestURI())
		}
	}
	for target, want := range targets {
		check(received(t, "GET "+target+" HTTP/1.1"), "target "+target, want)
	}
	for path, want := range rewrites {
		r := received(t, "GET / HTTP/1.1")
		r.URL.Path = path
		check(r, "path "+path, want)
	}
}

// A handler before this one may have rewritten the request.
func TestRewritesReachTheBackend(t *testing.T) {
	r := received(t, "GET /old?x=1 HTTP/1.1")
	r.URL.Path, r.URL.RawQuery, r.Host = "/new path", "y=2", "other.example"
	r.Header.Set("X-New", "1")
	r.TLS = new(tls.ConnectionState)
	got, _ := sent(t, newRequest(t, r, "id", false, deflate.Negotiation{}))
	if got.RequestURI != "/new%20path?y=2" || got.Host != "other.example" || got.Header.Get("X-New") != "1" {
		t.Errorf("got %s, Host %s, X-New %q, want what the handler set", got.RequestURI, got.Host, got.Header.Get("X-New"))
	}
	if got.Header.Get("X-Forwarded-Proto") != "https" {
		t.Errorf("got X-Forwarded-Proto %q, want https", got.Header.Get("X-Forwarded-Proto"))
	}
}
