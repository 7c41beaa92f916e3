// This file has backends answer pings in every way that libraries do, also while
// their client does not read: no connection is ended for it, none keeps its replay
// memory, and the client's pings are answered once each.

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// pongTrap is a backend and a client of its own that stops reading for a while.
type pongTrap struct {
	name  string
	kind  string
	flags []string
	talks bool // the client sends messages and pings meanwhile, as before and after
}

// What the libraries do with a ping while they cannot write: gorilla drops the pong
// after a second or, if nobody else is writing, never writes again; coder ends the
// connection after 5 s; ws ends one that has 60 pings to answer.
var pongTraps = []pongTrap{
	{"coder", "coder", nil, false},
	{"gorilla", "gorilla", nil, false},
	{"node", "node", nil, false},
	{"python", "python", nil, false},
	{"coder-talks", "coder", nil, true},
	{"gorilla-talks", "gorilla", nil, true},
	{"node-talks", "node", nil, true},
	{"python-talks", "python", nil, true},
	{"latest", "gorilla", []string{"-answer-pings", "latest"}, false},
	{"latest-talks", "gorilla", []string{"-answer-pings", "latest"}, true},
	{"none", "gorilla", []string{"-answer-pings", "none"}, false},
	{"none-talks", "coder", []string{"-answer-pings", "none"}, true},
}

// answersNone reports whether the backend answers no ping.
func (p *pongTrap) answersNone() bool { return len(p.flags) > 1 && p.flags[1] == "none" }

// pingTimeout is that of the trap's route. A client that does not read and says
// nothing has to answer within it.
func (p *pongTrap) pingTimeout() time.Duration {
	switch {
	case full:
		return 30 * time.Second
	case p.talks || p.answersNone():
		return 3 * time.Second
	default:
		return 15 * time.Second
	}
}

// Backends of all kinds stream to clients that stop reading for a while, long enough
// for what the libraries do when they cannot write a pong.
func TestPongTraps(t *testing.T) {
	stall := long(11*time.Second, 20*time.Second)
	backends := make([]*backendProcess, len(pongTraps))
	var site strings.Builder
	for i, trap := range pongTraps {
		if trap.answersNone() && !trap.talks && !full {
			// Its client would be given up: it is silent for longer than ping_timeout.
			pongTraps[i].talks = true
		}
		backends[i] = startBackend(t, trap.kind, trap.name, trap.flags...)
		fmt.Fprintf(&site, "handle /%s {\n websocket_proxy %s {\n ping_interval %v\n ping_timeout %v\n }\n}\n",
			trap.name, backends[i].addr, long(time.Second, 10*time.Second), pongTraps[i].pingTimeout())
	}
	p := startCaddy(t, "", site.String())
	faults := make([][]string, len(pongTraps))
	var all sync.WaitGroup
	for i := range pongTraps {
		trap, c := &pongTraps[i], startPinger(t, p.addr, "/"+pongTraps[i].name+"?stream=3000000")
		all.Go(func() { faults[i] = trap.spring(t, p, c, stall) })
	}
	all.Wait()
	for i, trap := range pongTraps {
		t.Run(trap.name, func(t *testing.T) {
			for _, f := range faults[i] {
				t.Error(f)
			}
			for _, conns := range backendConns(t, backends[i]) {
				if len(conns) != 1 {
					t.Errorf("connections of the backend: got %v, want one", conns)
				}
			}
		})
	}
}

// spring has the client stop reading, and returns what went wrong.
func (p *pongTrap) spring(t testing.TB, proxy *proxy, c *pinger, stall time.Duration) (faults []string) {
	fault := func(format string, args ...any) []string { return append(faults, fmt.Sprintf(format, args...)) }
	if err := c.talk(2*time.Second, 250*time.Millisecond); err != nil {
		return fault("before: %v", err)
	}
	read := c.stopReading()
	began := time.Now()
	moved, out := began, uint64(0)
	for time.Since(began) < stall {
		if p.talks {
			if err := c.talk(time.Second, time.Second); err != nil {
				return fault("%v after it stopped reading: %v", time.Since(began), err)
			}
		} else {
			pass(time.Second)
		}
		if now := proxy.of(t, p.name).BytesOut; now != out {
			moved, out = time.Now(), now
		}
	}
	if still := time.Since(moved); still < 7*time.Second {
		faults = fault("it took %v until nothing moved any more: the test shows nothing", stall-still)
	}
	read()
	if err := c.talk(2*time.Second, 250*time.Millisecond); err != nil {
		return fault("%v after it went on reading: %v", time.Since(began)-stall, err)
	}
	if !p.answersNone() {
		var wrong []string
		if !eventually(10*time.Second, func() bool { wrong = c.wrong(); return len(wrong) == 0 }) {
			faults = fault("of %d pings: %v", c.pings, wrong)
		}
	}
	var s shown
	drained := 5 * time.Second
	if p.answersNone() {
		drained = 2*p.pingTimeout() + 5*time.Second
	}
	began = time.Now()
	if !eventually(drained, func() bool { s = proxy.of(t, p.name); return s.Buffered == 0 }) {
		faults = fault("buffered_bytes: got %d after %v", s.Buffered, drained)
	}
	if s.Resumes != 0 || s.State != "open" {
		faults = fault("connection: got %+v, want it open and never resumed", s)
	}
	t.Logf("%s: %d pings, %d messages, read %d MB, nothing buffered after %v", p.name, c.pings, c.sent, c.read.Load()>>20, time.Since(began))
	return faults
}

// shown is what the admin API shows of a connection.
type shown struct {
	ID, State, URI    string
	Resumes, Replayed int
	BytesOut          uint64 `json:"bytes_out"`
	Buffered          int64  `json:"buffered_bytes"`
}

// of returns the only connection whose path is the given one, as the API shows it; a
// zero one if there is none.
func (p *proxy) of(t testing.TB, path string) (s shown) {
	t.Helper()
	for _, c := range p.connections(t) {
		if strings.HasPrefix(c.URI, "/"+path+"?") {
			p.call(t, http.MethodGet, "/connections/"+c.ID, &s)
		}
	}
	return s
}

// pinger is a client that sends numbered messages, and pings whose pongs it counts.
type pinger struct {
	conn *rawConn
	over chan struct{} // closed by run
	end  string        // how the connection ended; valid after over
	read atomic.Int64  // bytes of messages

	stall atomic.Pointer[chan struct{}] // if set, nothing is read until it is closed
	pings int                           // p0 to p<pings-1> were sent; only one goroutine sends
	sent  int                           // messages

	mu    sync.Mutex // held while writing; protects pongs
	pongs map[string]int
}

func startPinger(t testing.TB, addr, uri string) *pinger {
	t.Helper()
	c := &pinger{conn: dialURI(t, addr, uri, 64<<10), pongs: make(map[string]int), over: make(chan struct{})}
	go c.run()
	t.Cleanup(func() {
		c.conn.Close()
		<-c.over
	})
	return c
}

// run owns reading. It ends with the connection.
func (c *pinger) run() {
	defer close(c.over)
	for {
		if stall := c.stall.Load(); stall != nil {
			<-*stall
		}
		if err := c.next(); err != nil {
			c.end = err.Error()
			return
		}
	}
}

// next reads a frame.
func (c *pinger) next() error {
	h, err := ws.ReadHeader(c.conn.br)
	if err != nil {
		return err
	}
	if !h.OpCode.IsControl() {
		n, err := io.CopyN(io.Discard, c.conn.br, h.Length)
		c.read.Add(n)
		return err
	}
	payload := make([]byte, h.Length)
	if _, err := io.ReadFull(c.conn.br, payload); err != nil {
		return err
	}
	switch h.OpCode {
	case ws.OpPing:
		return c.write(ws.OpPong, string(payload))
	case ws.OpPong:
		c.mu.Lock()
		defer c.mu.Unlock()
		c.pongs[string(payload)]++
		return nil
	default:
		return fmt.Errorf("close frame %q", payload)
	}
}

// stopReading has the client read nothing until the returned function is called.
func (c *pinger) stopReading() (read func()) {
	stall := make(chan struct{})
	c.stall.Store(&stall)
	return func() {
		c.stall.Store(nil)
		close(stall)
	}
}

func (c *pinger) write(op ws.OpCode, payload string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.conn.Write(frame.Append(nil, op, []byte(payload), true))
	return err
}

// talk sends two messages and a ping every so often, for a while.
func (c *pinger) talk(d, every time.Duration) error {
	for until := time.Now().Add(d); time.Now().Before(until); {
		for range 2 {
			if err := c.write(ws.OpText, numbered(1, c.sent)); err != nil {
				return fmt.Errorf("message %d: %w", c.sent, err)
			}
			c.sent++
		}
		if err := c.write(ws.OpPing, fmt.Sprintf("p%d", c.pings)); err != nil {
			return fmt.Errorf("ping %d: %w", c.pings, err)
		}
		c.pings++
		select {
		case <-c.over:
			return fmt.Errorf("the connection was ended: %s", c.end)
		case <-time.After(every):
		}
	}
	return nil
}

// wrong says which pings were not answered once.
func (c *pinger) wrong() (wrong []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := range c.pings {
		if got := c.pongs[fmt.Sprintf("p%d", n)]; got != 1 {
			wrong = append(wrong, fmt.Sprintf("p%d: %d pongs", n, got))
		}
	}
	return wrong
}

// A backend that takes a second for a pong, or skips all pings but the latest, has a
// client with hundreds of pings under way: each is answered once.
func TestManyPings(t *testing.T) {
	late := rawBackend(t, func(r *http.Request, c *rawConn) {
		if c.accept(r) != nil {
			return
		}
		var answers sync.WaitGroup
		defer answers.Wait()
		pongs := make(chan latePong, 1000) // more than a test sends
		defer close(pongs)
		answers.Go(func() { answerLate(c, pongs) })
		for {
			h, payload, err := c.receive()
			if err != nil {
				return
			}
			if h.OpCode == ws.OpPing {
				pongs <- latePong{time.Now().Add(time.Second), payload}
			}
		}
	})
	latest := startBackend(t, "gorilla", "latest", "-answer-pings", "latest")
	p := startCaddy(t, "", fmt.Sprintf("handle /late {\n websocket_proxy %s\n}\nhandle /latest {\n websocket_proxy %s\n}", late, latest.addr))
	for _, path := range []string{"late", "latest"} {
		t.Run(path, func(t *testing.T) {
			c := startPinger(t, p.addr, "/"+path+"?")
			if err := c.talk(2*time.Second, 5*time.Millisecond); err != nil {
				t.Fatal(err)
			}
			var wrong []string
			if !eventually(15*time.Second, func() bool { wrong = c.wrong(); return len(wrong) == 0 }) {
				t.Errorf("of %d pings: %v", c.pings, wrong)
			}
			pass(200 * time.Millisecond) // a second answer would come now
			if wrong := c.wrong(); len(wrong) > 0 {
				t.Errorf("of %d pings: %v", c.pings, wrong)
			}
		})
	}
}

type latePong struct {
	at      time.Time
	payload string
}

// answerLate owns writing pongs. It ends with the channel.
func answerLate(c *rawConn, pongs <-chan latePong) {
	for pong := range pongs {
		pass(time.Until(pong.at))
		_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(pong.payload), false)) // who reads finds an end
	}
}
