// This file tests what goes to the backends that come after the first one.

package handshake

import (
	"crypto/tls"
	"net/http"
	"strings"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

func TestRedialIsTheSameRequest(t *testing.T) {
	r := received(t, "GET /a%2Fb?x=1&y=%0d%0a HTTP/1.1", "Host: ws.example.com:8443", "Cookie: a=1", "Cookie: b=2",
		"Authorization: Bearer abc", "Sec-WebSocket-Protocol: chat, superchat", "Holdfast-Resume: attempt=9, replayed=9, cause=9")
	q := newRequest(t, r, "id-1", false, deflate.Negotiation{})
	first, raw := sent(t, q)
	if _, ok := first.Header["Holdfast-Resume"]; ok {
		t.Errorf("got a Holdfast-Resume in the first handshake: %q", first.Header["Holdfast-Resume"])
	}
	const resume = "attempt=2, replayed=5, cause=1006"
	again, rawAgain := sent(t, q.Redial(deflate.Agreement{}, resume))
	want := first.Header.Clone()
	want["Holdfast-Resume"] = []string{resume}
	compareHeader(t, again.Header, want)
	if again.RequestURI != first.RequestURI || again.Host != first.Host || again.Method != http.MethodGet {
		t.Errorf("got %s %s of %s, want those of the first handshake", again.Method, again.RequestURI, again.Host)
	}
	if got := strings.Replace(rawAgain, "Holdfast-Resume: "+resume+"\r\n", "", 1); got != raw {
		t.Errorf("got other bytes than the first time:\n%s\nwant\n%s", got, raw)
	}
	// The first request is as it was, and a re-dial can be made of it again.
	if _, now := sent(t, q); now != raw {
		t.Errorf("got the first request changed:\n%s", now)
	}
	if next, _ := sent(t, q.Redial(deflate.Agreement{}, "attempt=3, replayed=5, cause=1006")); len(next.Header["Holdfast-Resume"]) != 1 {
		t.Errorf("got %q, want one", next.Header["Holdfast-Resume"])
	}
}

// Later backends are offered what the client was told, not what it offered.
func TestRedialOffersWhatTheClientWasTold(t *testing.T) {
	for _, test := range []struct {
		name           string
		offer, answer  string
		first, offered string
	}{
		{"nothing offered", "", "", "", ""},
		{"declined", "permessage-deflate", "", "permessage-deflate; client_no_context_takeover", ""},
		{
			"agreed", "permessage-deflate", "permessage-deflate", "permessage-deflate; client_no_context_takeover",
			"permessage-deflate; client_no_context_takeover",
		},
		{
			"agreed with a window", "permessage-deflate; server_max_window_bits=10", "permessage-deflate; server_max_window_bits=10",
			"permessage-deflate; client_no_context_takeover; server_max_window_bits=10",
			"permessage-deflate; client_no_context_takeover; server_max_window_bits=10",
		},
		{
			"unasked window", "permessage-deflate", "permessage-deflate; server_max_window_bits=10",
			"permessage-deflate; client_no_context_takeover", "permessage-deflate; client_no_context_takeover",
		},
		{
			"told more than it asked", "permessage-deflate", "permessage-deflate; server_no_context_takeover",
			"permessage-deflate; client_no_context_takeover",
			"permessage-deflate; client_no_context_takeover; server_no_context_takeover",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			var lines []string
			if test.offer != "" {
				lines = append(lines, "Sec-WebSocket-Extensions: "+test.offer)
			}
			r := received(t, get, lines...)
			negotiation := deflate.Negotiate(r.Header["Sec-Websocket-Extensions"], deflate.On)
			q := newRequest(t, r, "id", false, negotiation)
			if got, _ := sent(t, q); got.Header.Get("Sec-Websocket-Extensions") != test.first {
				t.Errorf("first offer: got %q, want %q", got.Header.Get("Sec-Websocket-Extensions"), test.first)
			}
			var answer []string
			if test.answer != "" {
				answer = []string{test.answer}
			}
			told, err := negotiation.Accept(answer)
			if err != nil {
				t.Fatal(err)
			}
			again, _ := sent(t, q.Redial(told, "attempt=1, replayed=0, cause=1001"))
			if got := again.Header.Get("Sec-Websocket-Extensions"); !sameOffer(got, test.offered) {
				t.Errorf("later offer: got %q, want %q", got, test.offered)
			}
		})
	}
}

// sameOffer compares two offers of one alternative, whose parameters are in any order.
func sameOffer(a, b string) bool {
	set := func(s string) map[string]int {
		m := map[string]int{}
		for p := range strings.SplitSeq(s, ";") {
			m[strings.TrimSpace(p)]++
		}
		return m
	}
	x, y := set(a), set(b)
	if len(x) != len(y) {
		return false
	}
	for p, n := range x {
		if y[p] != n {
			return false
		}
	}
	return true
}

// A policy that chooses by the request sees that of the client.
func TestHTTPIsTheClientsRequest(t *testing.T) {
	r := received(t, "GET /a%2Fb?x=1 HTTP/1.1", "Host: ws.example.com:8443", "Cookie: lb=2", "X-Several: 1", "X-Several: 2",
		"Holdfast-Resume: forged", "Sec-WebSocket-Protocol: chat")
	q := newRequest(t, r, "id-1", false, deflate.Negotiation{})
	for _, q := range []*Request{q, q.Redial(deflate.Agreement{}, "attempt=1, replayed=0, cause=1006")} {
		for range 2 { // it can be had again
			got, err := q.HTTP()
			if err != nil {
				t.Fatal(err)
			}
			if got.Method != http.MethodGet || got.URL.Path != "/a/b" || got.URL.RawQuery != "x=1" || got.Host != "ws.example.com:8443" {
				t.Errorf("got %s %s of %s", got.Method, got.URL, got.Host)
			}
			if c, err := got.Cookie("lb"); err != nil || c.Value != "2" || len(got.Header["X-Several"]) != 2 {
				t.Errorf("got headers %v, want the client's", got.Header)
			}
			if got.Header.Get("X-Forwarded-For") != "192.0.2.1" {
				t.Errorf("got X-Forwarded-For %q, want the client's address", got.Header.Get("X-Forwarded-For"))
			}
			if _, ok := got.Header["Holdfast-Resume"]; ok {
				t.Error("got a Holdfast-Resume")
			}
		}
	}
}

// What is known of the client stays known, also for who chooses the next backend.
func TestRequestRemembersItsClient(t *testing.T) {
	for _, test := range []struct {
		name, remote, ip string
		trusted          bool
		tls              *tls.ConnectionState
	}{
		{"client", "192.0.2.1:1234", "192.0.2.1", false, nil},
		{"behind a trusted proxy, over TLS", "[2001:db8::1]:1234", "198.51.100.7", true, new(tls.ConnectionState)},
		{"Unix socket", "@", "", false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := received(t, get)
			r.RemoteAddr, r.TLS = test.remote, test.tls
			q, err := NewRequest(r, Client{ID: "id", IP: test.ip, Trusted: test.trusted}, deflate.Negotiation{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, q := range []*Request{q, q.Redial(deflate.Agreement{}, "attempt=1, replayed=0, cause=1006")} {
				if q.ClientIP() != test.ip || q.Trusted() != test.trusted || q.secure != (test.tls != nil) {
					t.Errorf("got IP %s, trusted %t, TLS %t", q.ClientIP(), q.Trusted(), q.secure)
				}
				got, err := q.HTTP()
				if err != nil {
					t.Fatal(err)
				}
				if got.RemoteAddr != test.remote {
					t.Errorf("got RemoteAddr %q, want %q", got.RemoteAddr, test.remote)
				}
			}
		})
	}
}
