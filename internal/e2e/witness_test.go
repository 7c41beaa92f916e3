// This file is a backend that tells what happens to it while connections are moved, and
// how a test asks for a move.

package e2e

import (
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// witness is a backend that tells what happens to it, and waits where it is told to.
type witness struct {
	addr string

	mu       sync.Mutex
	requests []*http.Request
	texts    []string
	code     uint16        // of the close frame it got
	status   int           // with which it refuses; 0: it accepts
	subproto string        // with which it answers
	farewell []string      // what it sends after it got a close frame, before its own
	hold     chan struct{} // closed when it may answer a close frame; nil: at once
}

func startWitness(t testing.TB) *witness {
	t.Helper()
	w := new(witness)
	w.addr = rawBackend(t, w.serve)
	return w
}

func (w *witness) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *witness) serve(r *http.Request, c *rawConn) {
	w.mu.Lock()
	w.requests = append(w.requests, r)
	status, subproto := w.status, w.subproto
	w.mu.Unlock()
	if status != 0 {
		fmt.Fprintf(c, "HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n", status)
		return
	}
	var extra []string
	if subproto != "" {
		extra = append(extra, "Sec-WebSocket-Protocol: "+subproto+"\r\n")
	}
	if c.accept(r, extra...) != nil {
		return
	}
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		switch h.OpCode {
		case ws.OpPing:
			_ = ws.WriteFrame(c, ws.NewPongFrame([]byte(payload)))
		case ws.OpClose:
			w.bye(c, payload)
			return
		case ws.OpPong:
		default:
			w.set(func() { w.texts = append(w.texts, payload) })
			if h.Fin {
				_ = ws.WriteFrame(c, ws.NewTextFrame([]byte("echo "+payload)))
			}
		}
	}
}

func (w *witness) bye(c *rawConn, payload string) {
	w.mu.Lock()
	if len(payload) >= 2 {
		w.code = uint16(payload[0])<<8 | uint16(payload[1])
	}
	hold, farewell := w.hold, w.farewell
	w.mu.Unlock()
	for i, text := range farewell {
		if i == len(farewell)-1 && hold != nil {
			<-hold
			hold = nil
		}
		_ = ws.WriteFrame(c, ws.NewTextFrame([]byte(text)))
	}
	if hold != nil {
		<-hold
	}
	_ = ws.WriteFrame(c, ws.NewCloseFrame([]byte(payload)))
}

// got returns what the witness has seen.
func (w *witness) got() (requests []*http.Request, texts []string, code uint16) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.requests), slices.Clone(w.texts), w.code
}

// migrate asks for a connection to be moved and returns the status.
func (p *proxy) migrate(t testing.TB, id string) int {
	t.Helper()
	return p.call(t, http.MethodPost, "/connections/"+id+"/migrate", nil)
}

// waitState waits until a connection has a state and an upstream.
func (p *proxy) waitState(t testing.TB, id, state, upstream string) {
	t.Helper()
	var c resumption
	if !eventually(10*time.Second, func() bool {
		c = resumption{}
		p.call(t, http.MethodGet, "/connections/"+id, &c)
		return c.State == state && c.Upstream == upstream
	}) {
		t.Fatalf("connection: got %s on %s, want %s on %s", c.State, c.Upstream, state, upstream)
	}
}

func (c *rawConn) wantText(t testing.TB, want string) {
	t.Helper()
	for {
		h, got, err := c.receive()
		if err == nil && h.OpCode == ws.OpPing {
			continue
		}
		if err != nil || h.OpCode != ws.OpText || got != want {
			t.Fatalf("got %v %q, %v; want %q", h.OpCode, got, err, want)
		}
		return
	}
}
