// This file loses backends under clients that send all the time, and compares what
// the clients sent with what the backends read.

package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// full asks for the long form of tests that have one: HOLDFAST_FULL=1 in the
// environment. The short form loses the same backends, for a shorter time.
var full = os.Getenv("HOLDFAST_FULL") == "1"

// long returns short, or in the long form of the tests the other.
func long(short, other time.Duration) time.Duration {
	if full {
		return other
	}
	return short
}

// 100 clients send through two backends. One is killed and comes back, then the
// other, then both at once, busy. Each value of replay keeps its promise.
func TestResumeAfterKill(t *testing.T) {
	testLosses(t, losses{one: kill, both: killBusy, promises: killPromises, causes: []int{1006}})
}

// The same with backends that close in good order, and deliver what comes until they
// are answered: nobody notices, but for what may be lost with replay off.
func TestResumeAfterClose(t *testing.T) {
	testLosses(t, losses{one: term, both: term, promises: closePromises, causes: []int{1001, 1012, 1013}})
}

// losses are a way of losing backends.
type losses struct {
	one, both func(testing.TB, ...*backendProcess)
	promises  map[string]promise // by value of replay
	causes    []int              // that Holdfast-Resume may tell
}

// killBusy kills backends that have not read for a moment: much of what they were
// sent is lost with them.
func killBusy(t testing.TB, backends ...*backendProcess) {
	t.Helper()
	for _, b := range backends {
		b.freeze(t)
	}
	pass(200 * time.Millisecond)
	kill(t, backends...)
}

// How long one backend, and then both, are away.
var (
	oneAway  = long(500*time.Millisecond, 2*time.Second)
	bothAway = long(time.Second, 3*time.Second)
)

func testLosses(t *testing.T, l losses) {
	for _, replay := range []string{"unacked", "unsent", "strict", "off"} {
		t.Run(replay, func(t *testing.T) {
			promise := l.promises[replay]
			a := startBackend(t, "coder", "a", "-term-code", "1012")
			b := startBackend(t, "gorilla", "b", "-term-code", "1001")
			s := startSenders(t, fmt.Sprintf("websocket_proxy %s %s {\n replay %s\n resume_interval 20ms 200ms\n}", a.addr, b.addr, replay), promise.doubt)
			s.outage(t, l.one, oneAway, a)
			s.outage(t, l.one, oneAway, b)
			s.outage(t, l.both, bothAway, a, b)
			s.finish(t)
			s.check(t, promise, l.causes, a, b)
		})
	}
}

// senders are clients that send all the time, a quarter of them over TLS.
type senders struct {
	proxy *proxy
	all   []*sender
	doubt bool // losing a backend ends those that have just sent
}

const senderCount = 100

// startSenders runs Caddy with a site, plain and over TLS, and clients of it. With
// doubt set, a quarter of them has always paused for a while when a backend is lost.
func startSenders(t testing.TB, site string, doubt bool) *senders {
	t.Helper()
	s := &senders{proxy: startCaddy(t, "", site), doubt: doubt}
	secure, client := s.proxy.secure(t, site)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	for i := range senderCount {
		url := "ws://" + s.proxy.addr
		if i%4 == 3 {
			url = "wss://" + secure
		}
		c := &sender{id: i, pauses: doubt && (i%8 == 0 || i%8 == 3), quit: make(chan struct{}), sending: make(chan struct{}), over: make(chan struct{})}
		conn, _, err := websocket.Dial(ctx, url, &websocket.DialOptions{
			HTTPClient:     client,
			OnPingReceived: func(context.Context, []byte) bool { return !c.closing.Load() },
		})
		if err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
		c.conn = conn
		s.all = append(s.all, c)
		t.Cleanup(func() { _ = conn.CloseNow(); <-c.over })
		go c.read(ctx)
		go c.send(ctx)
	}
	return s
}

// secure adds the site, over TLS, to the running config, and returns its address and
// a client that trusts it.
func (p *proxy) secure(t testing.TB, site string) (addr string, client *http.Client) {
	t.Helper()
	_, port, _ := net.SplitHostPort(freeAddr(t))
	addr = "localhost:" + port
	p.reload(t, p.siteConfig("skip_install_trust", site)+fmt.Sprintf("https://%s {\n tls internal\n %s\n}\n", addr, site))
	conf := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // the CA was made a moment ago
	if !eventually(20*time.Second, func() bool {
		conn, err := tls.Dial("tcp", addr, conf)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}) {
		t.Fatal("no certificate is issued")
	}
	return addr, &http.Client{Transport: &http.Transport{TLSClientConfig: conf}}
}

// outage loses backends while the clients send, and starts them again, with another
// close code, some time later. It returns when all clients have one.
func (s *senders) outage(t testing.TB, lose func(testing.TB, ...*backendProcess), away time.Duration, backends ...*backendProcess) {
	t.Helper()
	s.pause(true)
	pass(long(700*time.Millisecond, 3*time.Second))
	if s.doubt {
		s.calm(t)
	}
	lose(t, backends...)
	if s.doubt && !eventually(10*time.Second, func() bool {
		on := s.proxy.stats(t).ByUpstream
		return !slices.ContainsFunc(backends, func(b *backendProcess) bool { return on[b.addr] > 0 })
	}) {
		t.Error("connections are still counted with backends that are gone")
	}
	s.pause(false) // not before: what is written to a backend that is gone is in doubt
	var from []int
	if len(backends) > 1 { // all there are
		s.settled(t, "held")
		for _, c := range s.all {
			from = append(from, int(c.sent.Load())+1) // one may just be on its way
		}
	}
	pass(away)
	for i := range from {
		c := s.all[i]
		c.held = append(c.held, [2]int{from[i], int(c.sent.Load())})
	}
	for _, b := range backends {
		b.restart(t, "-term-code", "1013")
	}
	s.settled(t, "open")
}

// pass lets time pass in which nothing can be waited for.
func pass(d time.Duration) { <-time.After(d) }

// pause has those that pause begin or end that. They send nothing after it returns.
func (s *senders) pause(now bool) {
	for _, c := range s.all {
		c.turn.Lock()
		c.paused = now && c.pauses
		c.turn.Unlock()
	}
}

// calm waits until all that those who pause have sent is acknowledged: by the pong to a
// ping behind it.
func (s *senders) calm(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for _, c := range s.all {
		if !c.pauses {
			continue
		}
		all.Go(func() {
			if err := c.conn.Ping(ctx); err != nil {
				t.Errorf("client %d, which pauses: %v", c.id, err)
			}
		})
	}
	all.Wait()
}

// settled waits until all connections that are left have a state.
func (s *senders) settled(t testing.TB, state string) {
	t.Helper()
	var now stats
	if !eventually(20*time.Second, func() bool {
		now = s.proxy.stats(t)
		return now.Total > 0 && now.ByState[state] == now.Total
	}) {
		t.Fatalf("connections: got %v, want all %s", now.ByState, state)
	}
}

// finish has all clients close in good order.
func (s *senders) finish(t testing.TB) {
	t.Helper()
	pass(300 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for _, c := range s.all {
		all.Go(func() { c.finish(ctx) })
	}
	all.Wait()
}

// check compares what was sent with what the backends recorded.
func (s *senders) check(t testing.TB, p promise, causes []int, backends ...*backendProcess) {
	t.Helper()
	of := make(map[int][]*backendConn)
	for id, conns := range backendConns(t, backends...) {
		client := senderOf(conns)
		if of[client] != nil && client >= 0 {
			t.Errorf("client %d has two connections, one of them %s", client, id)
		}
		of[client] = conns
	}
	var sum summary
	var faults []string
	var ended int
	for _, c := range s.all {
		d := &delivery{client: c.id, sent: int(c.sent.Load()), ended: c.end, held: c.held, conns: of[c.id]}
		if found := d.faults(p, causes...); len(found) > 0 {
			faults = append(faults, found...)
			faults = append(faults, fmt.Sprintf("client %d: its connections were %v", c.id, d.conns))
		}
		sum.add(d)
		switch {
		case c.end != (ending{}):
			ended++
			if c.pauses {
				faults = append(faults, fmt.Sprintf("client %d, nothing of which was in doubt, was closed: %+v", c.id, c.end))
			}
		case len(d.conns) < 2:
			faults = append(faults, fmt.Sprintf("client %d: got %d connections to backends, want more than one", c.id, len(d.conns)))
		}
	}
	t.Logf("%v, %d clients closed", &sum, ended)
	for _, fault := range faults[:min(len(faults), 30)] {
		t.Error(fault)
	}
	if len(faults) > 30 {
		t.Errorf("%d faults in all", len(faults))
	}
	// Without these the test would have shown nothing.
	if p.doubt && ended == 0 {
		t.Error("no client was in doubt")
	}
	if p.repeats && !slices.ContainsFunc(s.all, func(c *sender) bool {
		return slices.ContainsFunc(of[c.id], func(b *backendConn) bool { return b.mayRepeat() })
	}) {
		t.Error("no message was replayed")
	}
}

// mayRepeat reports whether messages were replayed.
func (c *backendConn) mayRepeat() bool {
	replayed, _ := c.replayed(1, nil)
	return replayed > 0
}

// sender is a client that sends a numbered message every 20 ms.
type sender struct {
	id      int
	conn    *websocket.Conn
	pauses  bool
	turn    sync.Mutex    // while a message is sent
	paused  bool          // guarded by turn
	sent    atomic.Int64  // messages whose write went well
	held    [][2]int      // see delivery; only the test's goroutine touches it
	closing atomic.Bool   // pings stay unanswered: after a close frame, a pong fails reading
	quit    chan struct{} // closed by finish
	sending chan struct{} // closed by send
	over    chan struct{} // closed by read
	end     ending        // how the connection ended, valid after over; zero once finish closed it
}

// send owns writing messages. It ends when the connection does, or by quit.
func (c *sender) send(ctx context.Context) {
	defer close(c.sending)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-c.quit:
			return
		case <-c.over:
			return
		case <-tick.C:
		}
		if !c.sendNext(ctx) {
			return
		}
	}
}

// sendNext sends a message, unless it pauses, and returns false if that fails.
func (c *sender) sendNext(ctx context.Context) bool {
	c.turn.Lock()
	defer c.turn.Unlock()
	if c.paused {
		return true
	}
	if c.conn.Write(ctx, websocket.MessageText, []byte(numbered(c.id, int(c.sent.Load())))) != nil {
		return false
	}
	c.sent.Add(1)
	return true
}

// read owns reading, which answers pings. It ends with the connection or ctx.
func (c *sender) read(ctx context.Context) {
	defer close(c.over)
	for {
		m, err := readCoder(ctx, c.conn)
		if err != nil {
			c.end = coderEnding(err)
			return
		}
		if m.kind != "text" { // the backends send nothing of their own accord
			c.end = ending{Code: 1006, Reason: fmt.Sprintf("unexpected %s message", m.kind)}
			return
		}
	}
}

// finish stops sending and closes the connection, if it has not ended yet.
func (c *sender) finish(ctx context.Context) {
	close(c.quit)
	<-c.sending
	// Once a pong has come, it is read that reads the answer to the close frame, and
	// no ping from before is left to answer.
	c.closing.Store(true)
	if err := c.conn.Ping(ctx); err == nil {
		_ = c.conn.Close(websocket.StatusNormalClosure, "") // read tells
	}
	select {
	case <-c.over:
	case <-ctx.Done():
		_ = c.conn.CloseNow()
		<-c.over
	}
	if c.end.Clean && c.end.Code == 1000 {
		c.end = ending{}
	}
}
