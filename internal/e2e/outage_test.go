// This file takes away all backends of many clients that go on sending, for long
// enough that what is kept for them reaches its bounds, and lets them come back.

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// outageBackend is a backend that can go and come back, at the same address. It
// checks that every client's messages come in order, without gaps, and repeated only
// where Holdfast-Resume says so.
type outageBackend struct {
	t       testing.TB
	addr    string
	serving sync.WaitGroup

	mu         sync.Mutex    // protects what follows
	handshake  time.Duration // from a request to its answer
	listener   net.Listener
	conns      map[net.Conn]struct{}
	shaking    int // handshakes under way …
	mostAtOnce int // … and the most at once, since it came last
	came       []time.Time
	next       map[string]int // by Holdfast-Connection: the message after the latest
	client     map[string]int // by Holdfast-Connection
	faults     []string
}

func startOutageBackend(t testing.TB) *outageBackend {
	t.Helper()
	b := &outageBackend{t: t, addr: reservedAddr(t), next: make(map[string]int), client: make(map[string]int)}
	b.come(0)
	t.Cleanup(func() { b.leave(); b.serving.Wait() })
	return b
}

// come has it listen, and take some time for each handshake.
func (b *outageBackend) come(handshake time.Duration) {
	b.t.Helper()
	ln, err := net.Listen("tcp", b.addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.mu.Lock()
	b.listener, b.conns, b.mostAtOnce, b.came = ln, make(map[net.Conn]struct{}), 0, nil
	b.handshake = handshake
	b.mu.Unlock()
	b.serving.Go(func() { b.accept(ln) })
}

// leave resets all connections, as the end of a process does.
func (b *outageBackend) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.listener.Close()
	for c := range b.conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	b.conns = nil // what is accepted later is closed at once
}

// accept owns the listener's loop; closing the listener ends it.
func (b *outageBackend) accept(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		b.mu.Lock()
		handshake := b.handshake
		gone := b.conns == nil || b.listener != ln
		if !gone {
			b.conns[conn] = struct{}{}
			b.came = append(b.came, time.Now())
			b.shaking++
			b.mostAtOnce = max(b.mostAtOnce, b.shaking)
		}
		b.mu.Unlock()
		if gone {
			conn.Close()
			continue
		}
		b.serving.Go(func() { b.serve(conn, handshake) })
	}
}

// serve owns a connection.
func (b *outageBackend) serve(conn net.Conn, handshake time.Duration) {
	defer func() {
		b.mu.Lock()
		delete(b.conns, conn)
		b.mu.Unlock()
		conn.Close()
	}()
	c := rawConnOf(conn)
	r, err := http.ReadRequest(c.br)
	if err == nil && handshake > 0 {
		pass(handshake)
	}
	b.mu.Lock()
	b.shaking-- // before the answer, after which the next may come
	b.mu.Unlock()
	if err != nil || c.accept(r) != nil {
		return
	}
	id := r.Header.Get("Holdfast-Connection")
	mayRepeat := 0
	if resume := r.Header.Get("Holdfast-Resume"); resume != "" {
		var attempt, cause int
		if _, err := fmt.Sscanf(resume, "attempt=%d, replayed=%d, cause=%d", &attempt, &mayRepeat, &cause); err != nil || cause != 1006 {
			b.fault("%s: Holdfast-Resume %q", id, resume)
		}
	}
	for n := 0; ; {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		switch h.OpCode {
		case ws.OpPing:
			if _, err := c.Write(frame.Append(nil, ws.OpPong, []byte(payload), false)); err != nil {
				return
			}
		case ws.OpText:
			b.got(id, n, mayRepeat, payload)
			n++
		case ws.OpClose:
			_, _ = c.Write(frame.Append(nil, ws.OpClose, []byte(payload), false))
			return
		default: // pongs
		}
	}
}

// got checks message n of a connection.
func (b *outageBackend) got(id string, n, mayRepeat int, payload string) {
	who, rest, _ := strings.Cut(payload, ":")
	number, filler, _ := strings.Cut(rest, ":")
	client, err := strconv.Atoi(who)
	at, err2 := strconv.Atoi(number)
	b.mu.Lock()
	defer b.mu.Unlock()
	next := b.next[id]
	if known, ok := b.client[id]; ok && known != client {
		b.faultLocked("%s: message of client %d, it is of %d", id, client, known)
	}
	b.client[id] = client
	switch {
	case err != nil || err2 != nil || len(filler) != outageMessage:
		b.faultLocked("client %d: message %d is torn: %.60q", client, n, payload)
	case at > next:
		b.faultLocked("client %d: messages %d to %d are lost", client, next, at-1)
	case at < next && n >= mayRepeat:
		b.faultLocked("client %d: message %d comes again, as number %d of the connection; %d may", client, at, n, mayRepeat)
	}
	b.next[id] = max(next, at+1)
}

func (b *outageBackend) fault(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.faultLocked(format, args...)
}

func (b *outageBackend) faultLocked(format string, args ...any) {
	if len(b.faults) < 20 {
		b.faults = append(b.faults, fmt.Sprintf(format, args...))
	}
}

// delivered returns how many messages of each client have come.
func (b *outageBackend) delivered() map[int]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := make(map[int]int)
	for id, client := range b.client {
		n[client] = b.next[id]
	}
	return n
}

func rawConnOf(conn net.Conn) *rawConn {
	return &rawConn{Conn: conn, br: newReader(conn)}
}

// outageMessage is the size of what a client sends.
const outageMessage = 1000

// crowd is many clients that send all the time.
type crowd struct {
	clients []*member
	quit    chan struct{}
	stop    func() // has them stop sending; writes that wait for room go on waiting
	sending sync.WaitGroup
	reading sync.WaitGroup
}

type member struct {
	id   int
	conn *rawConn
	sent atomic.Int64
	end  atomic.Pointer[ending] // once it was closed
}

// startCrowd opens n connections and has each send a message every so often; every
// gives that by client, 0 is never.
func startCrowd(t testing.TB, addr string, n int, every func(int) time.Duration) *crowd {
	t.Helper()
	c := &crowd{quit: make(chan struct{})}
	c.stop = sync.OnceFunc(func() { close(c.quit) })
	t.Cleanup(func() {
		c.stop()
		for _, m := range c.clients {
			m.conn.Close()
		}
		c.sending.Wait()
		c.reading.Wait()
	})
	for i := range n {
		m := &member{id: i, conn: rawDial(t, addr, "")}
		_ = m.conn.SetDeadline(time.Now().Add(3 * time.Minute))
		c.clients = append(c.clients, m)
		c.reading.Go(m.read)
	}
	for _, m := range c.clients {
		if d := every(m.id); d > 0 {
			c.sending.Go(func() { m.send(d, c.quit) })
		}
	}
	return c
}

// send ends with quit, or with the connection.
func (m *member) send(every time.Duration, quit <-chan struct{}) {
	pass(rand.N(every))
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		message := fmt.Sprintf("%d:%d:%s", m.id, m.sent.Load(), strings.Repeat("x", outageMessage))
		if _, err := m.conn.Write(frame.Append(nil, ws.OpText, []byte(message), true)); err != nil {
			return
		}
		m.sent.Add(1)
		select {
		case <-quit:
			return
		case <-tick.C:
		}
	}
}

// read ends with the connection.
func (m *member) read() {
	code, reason, before, err := m.conn.receiveClose()
	end := ending{Code: code, Reason: reason, Clean: err == nil}
	if err != nil {
		end.Reason = err.Error()
	}
	if len(before) > 0 {
		end.Reason += fmt.Sprintf("; before: %q", before)
	}
	m.end.Store(&end)
}

// ended counts the clients whose connection has ended, by how.
func (c *crowd) ended() map[ending]int {
	by := make(map[ending]int)
	for _, m := range c.clients {
		if e := m.end.Load(); e != nil {
			by[*e]++
		}
	}
	return by
}

// replayBytes is what the metric shows.
func (p *proxy) replayBytes(t testing.TB) int64 {
	t.Helper()
	if lines := grep(p.scrape(t), "caddy_connections_replay_bytes "); len(lines) > 0 {
		n, err := strconv.ParseFloat(strings.Fields(lines[0])[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return int64(n)
	}
	t.Fatal("no caddy_connections_replay_bytes")
	return 0
}

// All backends are away while the clients send more than may be kept: what is kept
// stays within replay_memory, and so does what the process needs for it; once the
// backend is back, the clients return a few at a time, and all that they sent arrives.
func TestOutage(t *testing.T) {
	clients, away, every, memory, concurrency := 300, 5*time.Second, 50*time.Millisecond, int64(8<<20), 16
	if full {
		clients, away, every, memory, concurrency = 2000, 20*time.Second, 200*time.Millisecond, 64<<20, 64
	}
	b := startOutageBackend(t)
	p := startBinary(t, fmt.Sprintf("metrics\nconnection_registry {\n replay_memory %d\n}", memory),
		fmt.Sprintf("websocket_proxy %s {\n resume_concurrency %d\n resume_timeout 60s\n}", b.addr, concurrency))
	c := startCrowd(t, p.addr, clients, func(int) time.Duration { return every })
	pass(long(time.Second, 3*time.Second))
	before := settledOrBusy(t, p)
	b.leave()

	var most int64
	var mostMemory float64
	watch := func(limit time.Duration, until func() bool) {
		for began := time.Now(); time.Since(began) < limit && !until(); pass(100 * time.Millisecond) {
			most = max(most, p.replayBytes(t))
			mostMemory = max(mostMemory, residentMemory(t, p.cmd.Process.Pid))
		}
	}
	began := time.Now()
	watch(5*time.Second, func() bool { return p.stats(t).ByState["held"] == clients })
	t.Logf("all held after %v", time.Since(began))
	watch(away-time.Since(began), func() bool { return false })
	if got := p.stats(t); got.ByState["held"] != clients {
		t.Errorf("connections: got %v, want all %d held; ended: %v", got.ByState, clients, c.ended())
	}
	var wanted int64
	for _, m := range c.clients {
		wanted += m.sent.Load()
	}
	t.Logf("held: %d KiB of at most %d kept, resident memory %.0f KiB before, %.0f at most: %.0f more (%.2f of replay_memory); %d messages sent",
		most>>10, memory>>10, before, mostMemory, mostMemory-before, (mostMemory-before)*1024/float64(memory), wanted)
	b.come(100 * time.Millisecond)
	back := time.Now()
	watch(60*time.Second, func() bool { return p.stats(t).ByState["open"] == clients })
	t.Logf("all open after %v", time.Since(back))
	pass(long(500*time.Millisecond, 2*time.Second))
	c.stop()
	c.sending.Wait()
	t.Logf("all has been written %v after the return", time.Since(back))
	var missing int
	watch(30*time.Second, func() bool {
		got := b.delivered()
		missing = 0
		for _, m := range c.clients {
			if got[m.id] != int(m.sent.Load()) {
				missing++
			}
		}
		return missing == 0
	})
	if missing > 0 {
		t.Errorf("%d clients miss messages", missing)
	}
	var total int64
	for _, m := range c.clients {
		total += m.sent.Load()
	}
	t.Logf("%d messages in all, delivered %v after the return", total, time.Since(back))
	if most > memory || most < memory*9/10 {
		t.Errorf("caddy_connections_replay_bytes: got up to %d, want up to %d, not more", most, memory)
	}
	if !eventually(5*time.Second, func() bool { return p.replayBytes(t) == 0 }) {
		t.Errorf("caddy_connections_replay_bytes at the end: got %d", p.replayBytes(t))
	}
	if e := c.ended(); len(e) > 0 {
		t.Errorf("ended: %v", e)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.faults {
		t.Error(f)
	}
	t.Logf("handshakes at once: %d; re-dials: %d, spread over %v", b.mostAtOnce, len(b.came), b.came[len(b.came)-1].Sub(b.came[0]))
	if b.mostAtOnce > concurrency || b.mostAtOnce < concurrency/2 {
		t.Errorf("handshakes at once: got up to %d, want up to %d, not more", b.mostAtOnce, concurrency)
	}
}

func settledOrBusy(t *testing.T, p *process) float64 {
	var most float64
	for range 10 {
		most = max(most, residentMemory(t, p.cmd.Process.Pid))
		pass(100 * time.Millisecond)
	}
	return most
}

// With nothing to hold them back, the clients return at times of their own.
func TestOutageJitter(t *testing.T) {
	const clients = 500
	const bound = 2 * time.Second
	b := startOutageBackend(t)
	p := startBinary(t, "", fmt.Sprintf("websocket_proxy %s {\n resume_concurrency %d\n resume_interval 100ms %v\n}", b.addr, clients, bound))
	c := startCrowd(t, p.addr, clients, func(int) time.Duration { return 0 })
	b.leave()
	pass(5 * time.Second)
	b.come(0)
	if !eventually(10*time.Second, func() bool { return p.stats(t).ByState["open"] == clients }) {
		t.Fatalf("connections: %+v", p.stats(t))
	}
	b.mu.Lock()
	came := slices.Clone(b.came)
	b.mu.Unlock()
	slices.SortFunc(came, time.Time.Compare)
	most := 0
	for i, j := 0, 0; i < len(came); i++ {
		for came[i].Sub(came[j]) > bound/20 {
			j++
		}
		most = max(most, i-j+1)
	}
	t.Logf("%d re-dials over %v, at most %d in %v", len(came), came[len(came)-1].Sub(came[0]), most, bound/20)
	if most > clients/4 {
		t.Errorf("re-dials in %v: got %d of %d", bound/20, most, clients)
	}
	if e := c.ended(); len(e) > 0 {
		t.Errorf("ended: %v", e)
	}
}

// With replay_overflow close, who sends more than may be kept is told, nobody else.
func TestOverflowClose(t *testing.T) {
	const clients = 200
	b := startOutageBackend(t)
	p := startCaddy(t, "metrics", fmt.Sprintf("websocket_proxy %s {\n replay_buffer 20KiB\n replay_overflow close\n}", b.addr))
	before := p.stats(t).ClosedByReason["overflow"]
	c := startCrowd(t, p.addr, clients, func(i int) time.Duration {
		if i%2 == 0 {
			return 50 * time.Millisecond // 60 KB
		}
		return 500 * time.Millisecond // 6 KB
	})
	pass(500 * time.Millisecond)
	b.leave()
	pass(3 * time.Second)
	b.come(0)
	if !eventually(15*time.Second, func() bool { s := p.stats(t); return s.ByState["open"] == s.Total }) {
		t.Errorf("connections: %+v", p.stats(t))
	}
	c.stop()
	c.sending.Wait()
	want := ending{Code: 1013, Reason: "too many messages while no backend is available", Clean: true}
	if got := c.ended(); got[want] != clients/2 || len(got) != 1 {
		t.Errorf("ended: got %v, want %d with 1013", got, clients/2)
	}
	if got := p.stats(t).ClosedByReason["overflow"] - before; got != clients/2 {
		t.Errorf("closed by reason overflow: got %d, want %d", got, clients/2)
	}
	var late []int
	if !eventually(10*time.Second, func() bool {
		got := b.delivered()
		late = nil
		for _, m := range c.clients {
			if m.end.Load() == nil && got[m.id] != int(m.sent.Load()) {
				late = append(late, m.id)
			}
		}
		return len(late) == 0
	}) {
		t.Errorf("clients %v miss messages", late)
	}
	for _, f := range b.faults {
		t.Error(f)
	}
	for _, m := range c.clients {
		m.conn.Close()
	}
}

var _ = context.Background

func newReader(conn net.Conn) *bufio.Reader { return bufio.NewReader(conn) }
