// This file tests which ends of a backend are the client's end, what the next backend is
// told, and which backends may be the next one.

package e2e

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// change is a backend that acts by the handshake: the first one is to be lost.
type change struct {
	requests chan *http.Request // of all handshakes, in order
	first    func(c *rawConn)   // what it does once it has accepted the first one
	// next answers a later one, the nth from 1, and returns whether it accepted.
	next func(n int, r *http.Request, c *rawConn) bool
	n    atomic.Int64
}

func (b *change) serve(r *http.Request, c *rawConn) {
	b.requests <- r
	n := int(b.n.Add(1)) - 1
	if n == 0 {
		if c.accept(r, answerTo(r)...) == nil {
			b.first(c)
		}
		return
	}
	accept := func(int, *http.Request, *rawConn) bool { return c.accept(r, answerTo(r)...) == nil }
	if b.next != nil {
		accept = b.next
	}
	if accept(n, r, c) {
		echoFrames(c)
	}
}

// answerTo picks the first subprotocol and accepts the compression as offered.
func answerTo(r *http.Request) (lines []string) {
	if offer, _, _ := strings.Cut(r.Header.Get("Sec-WebSocket-Protocol"), ","); offer != "" {
		lines = append(lines, "Sec-WebSocket-Protocol: "+offer+"\r\n")
	}
	if offer, _, _ := strings.Cut(r.Header.Get("Sec-WebSocket-Extensions"), ","); offer != "" {
		lines = append(lines, "Sec-WebSocket-Extensions: "+offer+"\r\n")
	}
	return lines
}

// echoFrames sends frames back as they come, pings as pongs, until a close frame, which
// it echoes.
func echoFrames(c *rawConn) {
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		h.Masked, h.Mask = false, [4]byte{}
		if h.OpCode == ws.OpPing {
			h.OpCode = ws.OpPong
		}
		if err := ws.WriteHeader(c, h); err != nil {
			return
		}
		if _, err := io.WriteString(c, payload); err != nil || h.OpCode == ws.OpClose {
			return
		}
	}
}

// asked returns the next request that a backend got.
func (b *change) asked(t testing.TB) *http.Request {
	t.Helper()
	select {
	case r := <-b.requests:
		return r
	case <-time.After(10 * time.Second):
		t.Fatal("no backend was asked")
		return nil
	}
}

// startChange runs Caddy before two backends that act as one.
func startChange(t testing.TB, b *change, options string) *pairing {
	t.Helper()
	b.requests = make(chan *http.Request, 100)
	return &pairing{proxy: startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n resume_interval 1ms 20ms\n %s\n}",
		rawBackend(t, b.serve), rawBackend(t, b.serve), options))}
}

// A close frame of a backend whose code is not in resume_on is the client's end: as it
// is, and no other backend is asked.
func TestCodesThatEnd(t *testing.T) {
	for _, options := range []string{"", "resume_on 4000", "replay strict"} {
		for _, tt := range []says{
			{1000, "bye"},
			{1000, ""},
			{1002, "protocol"},
			{1003, "unsupported"},
			{1007, "not UTF-8"},
			{1008, "policy"},
			{1009, "too big"},
			{1010, "extension"},
			{1011, "internal"},
			{3000, "unauthorized"},
			{4001, strings.Repeat("\u20ac", 41)},
			{frame.NoStatus, ""},
		} {
			t.Run(fmt.Sprintf("%s/%d", options, tt.code), func(t *testing.T) {
				var b *change
				heard := make(chan says, 1)
				b = &change{first: func(c *rawConn) {
					// With a message that is not acknowledged, and one to the client before.
					if _, _, err := c.receive(); err != nil {
						return
					}
					_, _ = c.Write(append(frame.Append(nil, ws.OpText, []byte("last words"), false), frame.AppendClose(nil, tt.code, tt.reason, false)...))
					code, reason, _, _ := c.receiveClose()
					heard <- says{code, reason}
				}}
				p := startChange(t, b, options)
				before := p.stats(t)
				c := rawDial(t, p.addr, "")
				c.send(t, ws.OpText, "do it")
				if _, payload, err := c.receive(); err != nil || payload != "last words" {
					t.Errorf("message before the close frame: got %q, %v", payload, err)
				}
				c.hears(t, "client", tt)
				c.sendClose(t, tt.code, tt.reason)
				if got := <-heard; got != tt {
					t.Errorf("backend: got %+v, want the client's answer %+v", got, tt)
				}
				c.leave(t)
				p.ended(t, before, "backend_closed", time.Second)
				if n := b.n.Load(); n != 1 {
					t.Errorf("handshakes: got %d, want one", n)
				}
			})
		}
	}
}

// A close frame whose code is in resume_on, by default 1001, 1012 and 1013, is the
// client's end only where clients are not held.
func TestCodesThatResume(t *testing.T) {
	for _, tt := range []struct {
		options string
		code    uint16
		ends    bool
	}{
		{"", 1001, false},
		{"", 1012, false},
		{"", 1013, false},
		{"", 1014, true},
		{"resume_on 4000 1011", 4000, false},
		{"resume_on 4000 1011", 1011, false},
		{"resume_on 4000 1011", 1012, true},
		{"resume_timeout off", 1012, true},
	} {
		t.Run(fmt.Sprintf("%s/%d", tt.options, tt.code), func(t *testing.T) {
			b := &change{first: func(c *rawConn) {
				_, _ = c.Write(frame.AppendClose(nil, tt.code, "goodbye", false))
				_, _, _, _ = c.receiveClose()
			}}
			p := startChange(t, b, tt.options)
			c := rawDial(t, p.addr, "")
			if tt.ends {
				c.hears(t, "client", says{tt.code, "goodbye"})
				c.sendClose(t, tt.code, "")
				c.leave(t)
				return
			}
			b.asked(t)
			want := fmt.Sprintf("attempt=1, replayed=0, cause=%d", tt.code)
			if got := b.asked(t).Header.Get("Holdfast-Resume"); got != want {
				t.Errorf("Holdfast-Resume: got %q, want %q", got, want)
			}
			checkEcho(t, c)
		})
	}
}

// status is an answer to a re-dial.
func status(code int) func(int, *http.Request, *rawConn) bool {
	return func(_ int, _ *http.Request, c *rawConn) bool {
		fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Length: 3\r\n\r\nno\n", code, http.StatusText(code))
		return false
	}
}

// A refusal of the client at the re-dial is final.
func TestRefusalsThatEnd(t *testing.T) {
	for _, code := range []int{400, 401, 403, 404, 405, 410, 422, 426, 431, 451} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			b := &change{first: (*rawConn).reset, next: status(code)}
			p := startChange(t, b, "")
			before := p.stats(t)
			c := rawDial(t, p.addr, "")
			c.hears(t, "client", says{1008, "refused by the backend"})
			c.sendClose(t, 1008, "")
			c.leave(t)
			p.ended(t, before, "refused", time.Second)
			if n := b.n.Load(); n != 2 {
				t.Errorf("handshakes: got %d, want two", n)
			}
		})
	}
}

// Any other answer than an acceptance is not: the next one is asked, until one accepts.
// No such backend gets any data.
func TestRefusalsThatDoNot(t *testing.T) {
	raw := func(answer string) func(int, *http.Request, *rawConn) bool {
		return func(_ int, _ *http.Request, c *rawConn) bool {
			_, _ = io.WriteString(c, answer)
			return false
		}
	}
	// upgrade accepts with the given lines and wants that nothing more comes.
	upgrade := func(t testing.TB, lines ...string) func(int, *http.Request, *rawConn) bool {
		return func(_ int, r *http.Request, c *rawConn) bool {
			_ = c.accept(r, lines...)
			if rest, _ := io.ReadAll(c.br); len(rest) > 0 {
				t.Errorf("a backend that cannot take over got %q", rest)
			}
			return false
		}
	}
	const offers = "Sec-WebSocket-Protocol: chat.v2, chat.v1\r\n"
	for _, tt := range []struct {
		name    string
		headers string // of the client
		next    func(t testing.TB) func(int, *http.Request, *rawConn) bool
	}{
		{"408", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(408) }},
		{"421", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(421) }},
		{"425", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(425) }},
		{"429", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(429) }},
		{"500", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(500) }},
		{"502", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(502) }},
		{"503", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(503) }},
		{"504", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(504) }},
		{"200", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(200) }},
		{"302", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return status(302) }},
		{"nothing", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return raw("") }},
		{"no HTTP", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return raw("SSH-2.0-x\r\n") }},
		{"half an answer", "", func(testing.TB) func(int, *http.Request, *rawConn) bool { return raw("HTTP/1.1 101 Switching") }},
		{"wrong accept", "", func(testing.TB) func(int, *http.Request, *rawConn) bool {
			return raw("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n")
		}},
		{"another subprotocol", offers, func(t testing.TB) func(int, *http.Request, *rawConn) bool {
			return upgrade(t, "Sec-WebSocket-Protocol: chat.v1\r\n")
		}},
		{"a subprotocol in another case", offers, func(t testing.TB) func(int, *http.Request, *rawConn) bool {
			return upgrade(t, "Sec-WebSocket-Protocol: Chat.v2\r\n")
		}},
		{"a subprotocol that was not offered", offers, func(t testing.TB) func(int, *http.Request, *rawConn) bool {
			return upgrade(t, "Sec-WebSocket-Protocol: chat.v3\r\n")
		}},
		{"no subprotocol", offers, func(t testing.TB) func(int, *http.Request, *rawConn) bool { return upgrade(t) }},
		{"a subprotocol unasked", "", func(t testing.TB) func(int, *http.Request, *rawConn) bool {
			return upgrade(t, "Sec-WebSocket-Protocol: chat.v2\r\n")
		}},
		{"compression unasked", "", func(t testing.TB) func(int, *http.Request, *rawConn) bool {
			return upgrade(t, "Sec-WebSocket-Extensions: permessage-deflate\r\n")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const tries = 3
			next := tt.next(t)
			b := &change{first: (*rawConn).reset}
			b.next = func(n int, r *http.Request, c *rawConn) bool {
				if n <= tries {
					return next(n, r, c)
				}
				return c.accept(r, answerTo(r)...) == nil
			}
			p := startChange(t, b, "")
			c := rawDial(t, p.addr, tt.headers)
			c.send(t, ws.OpText, "who is there?")
			b.asked(t)
			for n := range tries + 1 {
				var attempt, replayed, cause int
				got := b.asked(t).Header.Get("Holdfast-Resume")
				if _, err := fmt.Sscanf(got, "attempt=%d, replayed=%d, cause=%d", &attempt, &replayed, &cause); err != nil ||
					attempt != n+1 || replayed > 1 || cause != 1006 {
					t.Errorf("Holdfast-Resume: got %q, want attempt %d of cause 1006", got, n+1)
				}
			}
			if _, payload, err := c.receive(); err != nil || payload != "who is there?" {
				t.Errorf("echo: got %q, %v", payload, err)
			}
			checkEcho(t, c)
		})
	}
}

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
	nobody := reservedAddr(t)
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
