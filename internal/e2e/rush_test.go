// This file has many clients ask at once, from addresses of their own, and a backend
// that counts them.

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// ask sends a request from a local address, or any if that is empty, and returns the
// response. An error is one of the connection.
func ask(from, addr, request string) (*http.Response, *rawConn, error) {
	d := net.Dialer{Timeout: 30 * time.Second}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(60 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		conn.Close()
		return nil, nil, err
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return res, &rawConn{Conn: conn, br: br, client: true}, nil
}

// asks is ask, again if the connection is reset: a listener that a reload replaces
// resets those that it has not accepted yet.
func (p *proxy) asks(t testing.TB, from, request string) (*http.Response, *rawConn) {
	t.Helper()
	var res *http.Response
	var c *rawConn
	var err error
	if !eventually(10*time.Second, func() bool { res, c, err = ask(from, p.addr, request); return err == nil }) {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return res, c
}

// enter opens a WebSocket, also right after a reload.
func (p *proxy) enter(t testing.TB, extra string) *rawConn {
	t.Helper()
	res, c := p.asks(t, "", rawUpgrade(p.addr, extra))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status: got %d, want 101", res.StatusCode)
	}
	return c
}

// refusedWith has a client ask, which must be refused with a status and told when to
// come back.
func (p *proxy) refusedWith(t testing.TB, status int, extra string) {
	t.Helper()
	res, c := p.asks(t, "", rawUpgrade(p.addr, extra))
	defer c.Close()
	if res.StatusCode != status || res.Header.Get("Retry-After") == "" {
		t.Errorf("got %d with Retry-After %q, want %d with one", res.StatusCode, res.Header.Get("Retry-After"), status)
	}
}

// turnstile is a backend that counts its connections, and echoes.
type turnstile struct {
	*countedBackend

	mu        sync.Mutex
	now, most int
}

func newTurnstile(t testing.TB) *turnstile {
	t.Helper()
	b := new(turnstile)
	b.countedBackend = newCountedBackend(t, b.serve)
	return b
}

func (b *turnstile) serve(r *http.Request, c *rawConn) {
	b.count(1)
	defer b.count(-1)
	echoRaw(r, c)
}

func (b *turnstile) count(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now += n
	b.most = max(b.most, b.now)
}

// reset forgets, once no connection is left, what was counted.
func (b *turnstile) reset(t testing.TB) {
	t.Helper()
	if !eventually(20*time.Second, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.now == 0 }) {
		t.Error("connections are left at the backend")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.most = 0
	b.dials.Store(0)
}

// counts returns how often the backend was dialed since the last reset, and the most
// connections that it had at once.
func (b *turnstile) counts() (dials, most int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return int(b.dials.Load()), b.most
}

// rush has n clients ask at once, from as many addresses in turn, and returns those who
// were let in, by address, and how many were refused, by status.
func (p *proxy) rush(t testing.TB, n, addresses int) (in map[string][]*rawConn, refused map[int]int) {
	t.Helper()
	in, refused = make(map[string][]*rawConn), make(map[int]int)
	var mu sync.Mutex // guards both
	var wg sync.WaitGroup
	gate := make(chan struct{}) // closed when all are ready
	for i := range n {
		from := fmt.Sprint("127.0.0.", 2+i%addresses)
		wg.Go(func() {
			<-gate
			res, c, err := ask(from, p.addr, rawUpgrade(p.addr, ""))
			if err != nil {
				t.Errorf("client %d: %v", i, err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if res.StatusCode == http.StatusSwitchingProtocols {
				in[from] = append(in[from], c)
				return
			}
			c.reset() // else its port is blocked for a minute, and ports are few
			refused[res.StatusCode]++
			if res.Header.Get("Retry-After") == "" {
				t.Errorf("client %d: got %d without Retry-After", i, res.StatusCode)
			}
		})
	}
	close(gate)
	wg.Wait()
	return in, refused
}
