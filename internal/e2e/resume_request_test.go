// This file tests what the next backend is told.

package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// The request for the next backend is the first one's, but for the key and for what it
// is told of the interruption.
func TestResumedRequest(t *testing.T) {
	b := &change{first: func(c *rawConn) {
		_, _, _ = c.receive()
		c.reset()
	}}
	// The second one is lost as well: by a close frame, and after it has acknowledged.
	b.next = func(n int, r *http.Request, c *rawConn) bool {
		switch n {
		case 1:
			_ = c.accept(r, answerTo(r)...)
			for {
				h, payload, err := c.receive()
				if err != nil {
					return false
				}
				switch h.OpCode {
				case ws.OpPing:
					_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(payload), false))
				case ws.OpText:
					_, _ = c.Write(frame.Append(nil, ws.OpText, []byte(payload), false))
					if payload == "three" {
						_, _ = c.Write(frame.AppendClose(nil, 1012, "", false))
					}
				case ws.OpClose:
					return false
				default:
				}
			}
		case 2:
			return status(503)(n, r, c)
		default:
			return c.accept(r, answerTo(r)...) == nil
		}
	}
	p := startChange(t, b, "")
	const extra = "Cookie: session=abc; theme=dark\r\nCookie: second=1\r\nAuthorization: Bearer s3cr3t\r\nOrigin: https://example.com\r\n" +
		"User-Agent: me\r\nX-Custom: one\r\nX-Custom: two\r\nAccept-Language: en, de;q=0.5\r\n" +
		"Sec-WebSocket-Protocol: chat.v2, chat.v1\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n" +
		"Holdfast-Resume: attempt=9, replayed=9, cause=1000\r\nHoldfast-Connection: mine\r\n"
	const target = "/some%20path/%E2%82%AC;a=b?q=1&r=%2F&empty=&q=2"
	res, c := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, extra), "/chat?x=1", target, 1))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status: got %d", res.StatusCode)
	}
	const told = "permessage-deflate; client_no_context_takeover"
	if got := res.Header.Get("Sec-WebSocket-Extensions"); got != told {
		t.Fatalf("extensions: got %q, want %q", got, told)
	}
	first := b.asked(t)
	c.send(t, ws.OpText, "one")
	c.send(t, ws.OpText, "two")

	resumes := []string{"attempt=1, replayed=", "attempt=1, replayed=0, cause=1012", "attempt=2, replayed=0, cause=1012"}
	for i, want := range resumes {
		again := b.asked(t)
		if i == 0 {
			for _, payload := range []string{"one", "two"} {
				if _, got, err := c.receive(); err != nil || got != payload {
					t.Fatalf("echo: got %q, %v; want %q", got, err, payload)
				}
			}
			c.send(t, ws.OpText, "three")
		}
		if again.RequestURI != target || again.RequestURI != first.RequestURI || again.Host != p.addr || again.Method != http.MethodGet {
			t.Errorf("re-dial %d: got %s %s of %s, want %s of %s", i, again.Method, again.RequestURI, again.Host, target, p.addr)
		}
		if got := again.Header.Get("Holdfast-Resume"); !strings.HasPrefix(got, want) {
			t.Errorf("re-dial %d: Holdfast-Resume: got %q, want %q", i, got, want)
		}
		got, old := again.Header.Clone(), first.Header.Clone()
		if got.Get("Sec-WebSocket-Key") == old.Get("Sec-WebSocket-Key") {
			t.Errorf("re-dial %d: the key is the same", i)
		}
		for _, h := range []http.Header{got, old} {
			h.Del("Sec-WebSocket-Key")
			h.Del("Holdfast-Resume")
		}
		if !maps.EqualFunc(got, old, slices.Equal) {
			t.Errorf("re-dial %d: headers: got %v, want %v", i, got, old)
		}
	}
	if first.Header.Get("Holdfast-Resume") != "" || first.Header.Get("Holdfast-Connection") == "mine" || first.Header.Get("Holdfast-Connection") == "" {
		t.Errorf("first handshake: got %q", first.Header)
	}
	for _, name := range []string{"Cookie", "Authorization", "Origin", "X-Custom", "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions"} {
		if first.Header.Get(name) == "" {
			t.Errorf("first handshake: no %s: got %v", name, first.Header)
		}
	}
	if _, payload, err := c.receive(); err != nil || payload != "three" {
		t.Fatalf("echo: got %q, %v; want three", payload, err)
	}
	checkEcho(t, c)
}

// An attempt is a dial, also one to an upstream where nobody listens; those of the next
// interruption are counted anew. What may be repeats is counted by messages.
func TestResumeHeader(t *testing.T) {
	b := &change{}
	b.first = func(c *rawConn) {
		for range 4 { // three messages and the proxy's ping after the first
			_, _, _ = c.receive()
		}
		c.reset()
	}
	b.next = func(n int, r *http.Request, c *rawConn) bool {
		if n > 1 {
			return c.accept(r) == nil
		}
		_ = c.accept(r)
		_, _, _ = c.receive()
		c.reset()
		return false
	}
	b.requests = make(chan *http.Request, 100)
	nobody := freeAddr(t)
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n resume_interval 1ms 5ms\n}", rawBackend(t, b.serve), nobody))
	c := rawDial(t, p.addr, "")
	b.asked(t)
	for _, m := range []string{"one", "two", "three"} {
		c.send(t, ws.OpText, m)
	}
	// The one that is lost is not the first to be tried, so nobody is.
	for i := range 2 {
		if got, want := b.asked(t).Header.Get("Holdfast-Resume"), "attempt=2, replayed=3, cause=1006"; got != want {
			t.Errorf("interruption %d: got %q, want %q", i+1, got, want)
		}
	}
	for _, m := range []string{"one", "two", "three"} {
		if _, payload, err := c.receive(); err != nil || payload != m {
			t.Errorf("echo: got %q, %v; want %q", payload, err, m)
		}
	}
	checkEcho(t, c)
}
