// This file tests which answers to a re-dial are the client's end, and which backends
// may be the next one.

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

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
