// This file has a client whose message breaks every backend that reads it.

package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// A message that makes every backend exit takes resume_limit of them down, and then its
// client; the others go on with the backend that is left.
func TestPoison(t *testing.T) {
	for _, tt := range []struct {
		name, options string
		limit         int
	}{
		{"default", "", 3},
		{"one", "resume_limit 1", 1},
		{"two", "resume_limit 2", 2},
		{"four", "resume_limit 4", 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var all []*backendProcess
			var addrs []string
			for i := range tt.limit + 1 {
				b := startBackend(t, []string{"coder", "gorilla"}[i%2], fmt.Sprint("b", i), "-poison", "boom")
				all, addrs = append(all, b), append(addrs, b.addr)
			}
			p := startCaddy(t, "", "websocket_proxy "+strings.Join(addrs, " ")+" {\n resume_interval 5ms 50ms\n "+tt.options+"\n}")
			before := p.stats(t).ClosedByReason["poison"]
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			const others = 40
			var clients []*echoed
			for i := range others {
				clients = append(clients, dialEchoed(ctx, t, p, i))
			}
			poisoner := dialEchoed(ctx, t, p, -1)
			for _, c := range clients {
				c.exchange("hello")
			}
			if tt.limit < 3 { // a low limit leaves no room for who happens to be in doubt
				if !eventually(20*time.Second, func() bool {
					return !slices.ContainsFunc(p.resumed(t), func(c resumption) bool { return c.Buffered > 0 })
				}) {
					t.Errorf("connections: got %+v, want all acknowledged", p.resumed(t))
				}
			} else {
				for _, c := range clients[:others/2] {
					c.say("just sent") // it may be in doubt when the first backend ends
				}
			}
			poisoner.say("boom")
			_, err := readCoder(ctx, poisoner.conn)
			if got, want := coderEnding(err), (ending{Code: 1011, Reason: "a message breaks the backends", Clean: true}); got != want {
				t.Errorf("the client with the message: got %+v, want %+v", got, want)
			}
			// Not to one that is just ending: that would be in doubt.
			left := make(map[string]int)
			if !eventually(20*time.Second, func() bool {
				left = p.stats(t).ByUpstream
				for addr, n := range left {
					if n == 0 {
						delete(left, addr)
					}
				}
				return len(left) == 1 && p.stats(t).ByState["open"] == others
			}) {
				t.Errorf("connections: got %v by upstream, want all on one", left)
			}
			for _, c := range clients {
				c.exchange("still here")
			}

			for _, b := range all {
				if left[b.addr] > 0 {
					select {
					case <-b.life.exited:
						t.Errorf("backend %s ended, more than %d of them", b.name, tt.limit)
					default:
					}
				} else if code := b.exit(t); code != 1 {
					t.Errorf("backend %s: exit code: got %d, want 1", b.name, code)
				}
			}
			if !eventually(10*time.Second, func() bool { return p.stats(t).Total == others }) {
				t.Errorf("connections: got %d, want those of the %d other clients", p.stats(t).Total, others)
			}
			if n := p.stats(t).ClosedByReason["poison"] - before; n != 1 {
				t.Errorf("clients ended as poison: got %d, want one", n)
			}
			for _, c := range clients {
				if err := c.conn.Close(websocket.StatusNormalClosure, ""); err != nil {
					t.Errorf("client %d: %v", c.id, err)
				}
			}
		})
	}
}

// echoed is a client whose messages come back.
type echoed struct {
	t    testing.TB
	ctx  context.Context
	id   int
	conn *websocket.Conn
	said []string // in order; an echo may be lost with its backend, or come twice
}

func dialEchoed(ctx context.Context, t testing.TB, p *proxy, id int) *echoed {
	t.Helper()
	conn, _, err := websocket.Dial(ctx, "ws://"+p.addr+"/?echo=1", nil)
	if err != nil {
		t.Fatalf("client %d: %v", id, err)
	}
	t.Cleanup(func() { _ = conn.CloseNow() })
	return &echoed{t: t, ctx: ctx, id: id, conn: conn}
}

func (c *echoed) say(text string) {
	c.t.Helper()
	c.said = append(c.said, text)
	if err := c.conn.Write(c.ctx, websocket.MessageText, []byte(text)); err != nil {
		c.t.Errorf("client %d: sending %q: %v", c.id, text, err)
	}
}

// exchange says something and waits until it comes back.
func (c *echoed) exchange(text string) {
	c.t.Helper()
	c.say(text)
	for {
		m, err := readCoder(c.ctx, c.conn)
		if err != nil {
			c.t.Errorf("client %d: waiting for %q: %+v", c.id, text, coderEnding(err))
			return
		}
		switch got := string(m.data); {
		case got == text:
			return
		case !strings.Contains(strings.Join(c.said, "\n"), got):
			c.t.Errorf("client %d: got %q, want %q", c.id, got, text)
		}
	}
}
