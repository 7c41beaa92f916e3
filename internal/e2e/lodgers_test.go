// This file has the WebSockets of a soak that stay.

package e2e

import (
	"fmt"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// lodger is a WebSocket that stays, whatever becomes of its backends.
type lodger struct {
	*rawConn
	over chan struct{} // closed by read

	mu   sync.Mutex // guards writing and what follows
	said int
	got  int
	err  error
}

func (s *soak) reside(t testing.TB, dial func() (net.Conn, error)) *lodger {
	t.Helper()
	conn, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	r := &lodger{rawConn: s.upgrade(conn), over: make(chan struct{})}
	if r.rawConn == nil {
		conn.Close()
		t.Fatal("a lodger is refused")
	}
	_ = conn.SetDeadline(time.Time{})
	t.Cleanup(r.leave)
	go r.read()
	return r
}

// read owns reading: it answers pings, and notes the newest answer. It ends with the
// connection.
func (r *lodger) read() {
	defer close(r.over)
	for {
		h, payload, err := r.receive()
		r.mu.Lock()
		switch {
		case err == nil && h.OpCode == ws.OpClose:
			err = fmt.Errorf("closed: %q", payload)
		case h.OpCode == ws.OpPing:
			_, err = r.Write(frame.Append(nil, ws.OpPong, []byte(payload), true))
		case h.OpCode == ws.OpText:
			if n, bad := strconv.Atoi(payload); bad == nil {
				r.got = max(r.got, n)
			}
		}
		r.err = err
		r.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// wantEcho says something and wants an answer. It says it again after a while: a backend
// that was killed may have read it and not answered.
func (r *lodger) wantEcho(t testing.TB) {
	t.Helper()
	r.mu.Lock()
	r.said++
	want := r.said
	r.mu.Unlock()
	for range 10 {
		r.mu.Lock()
		_, err := r.Write(frame.Append(nil, ws.OpText, []byte(strconv.Itoa(want)), true))
		r.mu.Unlock()
		var ended bool
		answered := eventually(3*time.Second, func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			err, ended = r.err, r.err != nil
			return ended || r.got >= want
		})
		if ended {
			t.Fatalf("a lodger was ended: %v", err)
		}
		if answered {
			return
		}
	}
	t.Fatal("a lodger gets no answer")
}

func (r *lodger) leave() {
	r.Close()
	<-r.over
}
