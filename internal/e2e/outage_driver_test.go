// This file is a backend that goes and comes back, and a crowd of clients that go on
// sending.

package e2e

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
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
	b := &outageBackend{t: t, addr: freeAddr(t), next: make(map[string]int), client: make(map[string]int)}
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

func newReader(conn net.Conn) *bufio.Reader { return bufio.NewReader(conn) }
