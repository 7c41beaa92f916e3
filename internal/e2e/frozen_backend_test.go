// This file has backends stop in the middle of things: they are frozen, or read no
// more.

package e2e

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// How soon a frozen peer is found, in the tests that have one.
const watchful = "ping_interval 500ms\n ping_timeout 3s\n handshake_timeout 3s\n resume_interval 20ms 200ms"

// A backend that is frozen is found by its silence and left: clients that send go on
// with the other one and miss nothing. So they do when that one freezes, is killed, or
// is thawed and reads what it had.
func TestFrozenBackend(t *testing.T) {
	for _, kinds := range [][2]string{{"coder", "node"}, {"gorilla", "python"}} {
		t.Run(kinds[0]+" and "+kinds[1], func(t *testing.T) {
			a, b := startBackend(t, kinds[0], "a"), startBackend(t, kinds[1], "b")
			s := startSenders(t, fmt.Sprintf("websocket_proxy %s %s {\n %s\n}", a.addr, b.addr, watchful), false)
			s.pingThrough(t)
			for _, frozen := range [][2]*backendProcess{{a, b}, {b, a}} {
				pass(long(700*time.Millisecond, 5*time.Second))
				frozen[0].freeze(t)
				s.allOn(t, frozen[1].addr)
				pass(long(300*time.Millisecond, 5*time.Second))
				if frozen[0] == a {
					kill(t, a)
					a.restart(t)
				} else {
					b.thaw(t)
				}
			}
			s.finish(t)
			s.check(t, promise{repeats: true}, []int{1006}, a, b)
		})
	}
}

// pingThrough is that of rawConn, for all connections.
func (s *senders) pingThrough(t testing.TB) {
	t.Helper()
	for _, c := range s.all {
		if err := c.conn.Ping(t.Context()); err != nil {
			t.Fatalf("client %d: no pong comes: %v", c.id, err)
		}
	}
}

// allOn waits until all connections are open on one upstream.
func (s *senders) allOn(t testing.TB, upstream string) {
	t.Helper()
	var now stats
	if !eventually(20*time.Second, func() bool {
		now = s.proxy.stats(t)
		return now.ByState["open"] == len(s.all) && now.ByUpstream[upstream] == len(s.all)
	}) {
		t.Fatalf("connections: got %+v, want all %d open on %s", now, len(s.all), upstream)
	}
}

// A frozen backend is found by clients that say nothing, too.
func TestFrozenBackendIdle(t *testing.T) {
	a := startBackend(t, "gorilla", "a")
	b := startBackend(t, "coder", "b")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n %s\n}", a.addr, b.addr, watchful))
	var conns []*rawConn
	for range 20 {
		c := rawDial(t, p.addr, "")
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		c.pingThrough(t)
		conns = append(conns, c)
		go answerPings(c)
	}
	if got := p.stats(t).ByUpstream[a.addr]; got != 10 {
		t.Fatalf("connections on the backend to be frozen: got %d, want 10", got)
	}
	a.freeze(t)
	if !eventually(20*time.Second, func() bool { return p.stats(t).ByUpstream[b.addr] == 20 }) {
		t.Fatalf("connections: got %+v, want all on %s", p.stats(t), b.addr)
	}
	a.thaw(t)
	for _, c := range conns {
		c.Close()
	}
}

// answerPings owns reading a client's connection: it answers the pings and ends with it.
func answerPings(c *rawConn) {
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		if h.OpCode == ws.OpPing {
			if _, err := c.Write(frame.Append(nil, ws.OpPong, []byte(payload), true)); err != nil {
				return
			}
		}
	}
}

// A backend that reads no more is found and left, also if it goes on sending, and if
// the kernels between it and the proxy have room for all that the proxy keeps.
func TestDeafBackend(t *testing.T) {
	type deaf struct {
		name, settings string
		sends          bool
	}
	tests := []deaf{
		{"silent", "ping_interval 500ms\n ping_timeout 3s", false},
		{"sends", "ping_interval 500ms\n ping_timeout 3s", true},
		{"sends, small buffer", "ping_interval 500ms\n ping_timeout 3s\n replay_buffer 1MiB", true},
		// Without pings, what the backend's kernel has had for ping_timeout counts as read.
		{"silent, no pings", "ping_interval off\n ping_timeout 1s", false},
	}
	if full {
		tests = append(tests, deaf{"silent, no pings, small buffer", "ping_interval off\n ping_timeout 1s\n replay_buffer 1MiB", false})
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			over := make(chan struct{})
			a := rawBackend(t, func(r *http.Request, c *rawConn) { serveDeaf(r, c, test.sends, over) })
			b := startBackend(t, "coder", "b")
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n write_timeout 2s\n lb_policy round_robin\n %s\n}", a, b.addr, test.settings))
			c := dialURI(t, p.addr, "/", 0)
			if p.stats(t).ByUpstream[a] == 0 { // the next one is there
				c.Close()
				p.waitEmpty(t)
				c = dialURI(t, p.addr, "/", 0)
			}
			c.send(t, ws.OpText, "hear")
			c.pingThrough(t)
			go answerPings(c)
			c.send(t, ws.OpText, "deaf")
			w := &writer{conn: c, quit: make(chan struct{}), over: make(chan struct{})}
			go w.run()
			began := time.Now()
			if eventually(30*time.Second, func() bool { return p.stats(t).ByUpstream[b.addr] == 1 }) {
				t.Logf("left after %v, %d messages sent", time.Since(began), w.sent.Load())
				close(w.quit)
				<-w.over
				b.wantNumbers(t, int(w.sent.Load()), strings.Contains(test.settings, "off"))
			} else {
				t.Errorf("the backend is not left: %+v; %d messages sent", p.connections(t), w.sent.Load())
			}
			close(over)
			_ = c.tcp().SetLinger(0) // else what it has sent is delivered first
			c.Close()
			<-w.over
		})
	}
}

// serveDeaf answers pings until it gets the message "deaf". Then it reads no more; it
// may go on sending. It ends with over.
func serveDeaf(r *http.Request, c *rawConn, sends bool, over <-chan struct{}) {
	if c.accept(r) != nil {
		return
	}
	for payload := ""; payload != "deaf"; {
		h, p, err := c.receive()
		if err != nil {
			return
		}
		if h.OpCode == ws.OpPing {
			_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(p), false)) // receive finds an end
		}
		payload = p
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-over:
			return
		case <-tick.C:
		}
		if sends {
			if _, err := c.Write(frame.Append(nil, ws.OpText, []byte("tick"), false)); err != nil {
				return
			}
		}
	}
}

// writer sends numbered messages of 16 kB.
type writer struct {
	conn *rawConn
	sent atomic.Int64
	quit chan struct{}
	over chan struct{} // closed by run
}

// run ends with quit or, as a write may take for ever, with the connection.
func (w *writer) run() {
	defer close(w.over)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		message := fmt.Sprintf("%d:%s", w.sent.Load(), strings.Repeat("x", 16_000))
		if _, err := w.conn.Write(frame.Append(nil, ws.OpText, []byte(message), true)); err != nil {
			return
		}
		w.sent.Add(1)
		select {
		case <-w.quit:
			return
		case <-tick.C:
		}
	}
}

// wantNumbers waits until the last of a writer's n messages has been recorded, and
// checks that those before it have, in order. The first ones may be missing if
// another backend may have had them.
func (b *backendProcess) wantNumbers(t testing.TB, n int, firstMissing bool) {
	t.Helper()
	var numbers []int
	// Where the kernel has to acknowledge, a full buffer goes on once a ping_timeout.
	if !eventually(40*time.Second, func() bool {
		numbers = nil
		for _, conns := range backendConns(t, b) {
			for _, text := range conns[len(conns)-1].texts {
				number, _, _ := strings.Cut(text, ":")
				if number, err := strconv.Atoi(number); err == nil {
					numbers = append(numbers, number)
				}
			}
		}
		return len(numbers) > 0 && numbers[len(numbers)-1] == n-1
	}) {
		t.Fatalf("messages: got %d, the last of %d is not among them", len(numbers), n)
	}
	if !firstMissing && numbers[0] != 0 {
		t.Errorf("messages: got them from number %d, want all", numbers[0])
	}
	for i, number := range numbers {
		if number != numbers[0]+i {
			t.Fatalf("messages: got number %d as number %d", number, numbers[0]+i)
		}
	}
}
