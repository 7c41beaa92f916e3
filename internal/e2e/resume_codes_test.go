// This file tests which close frames of a backend are the client's end.

package e2e

import (
	"fmt"
	"io"
	"net/http"
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
