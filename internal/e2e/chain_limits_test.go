// This file tests whom the limits of a chain count, and that no place is lost when all
// come and go at once (rows C7, C45 and C67 of the seed matrix).

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plainChain is a chain for any bytes, also of IPv6, with one route at each hop. Clients of
// 127.0.0.1 have to send a header at each. version is that of the headers in between, and
// last the settings of the last hop.
func plainChain(t testing.TB, n int, backend, version, last string) *chain {
	t.Helper()
	return startChain(t, n, func(c *chain, h *hop, i int) string {
		_, port, _ := net.SplitHostPort(h.addr)
		to, settings := backend, last
		if !c.last(i) {
			to, settings = c.hops[i+1].addr, "proxy_protocol "+version
		}
		return h.layer4Config(h.addr+" [::1]:"+port, "metrics", fromProxies+toAll(fmt.Sprintf("%s {\n name all\n %s\n}", to, settings)))
	})
}

// served reports whether a client that begins with a header, or none, has its echo. It has
// to be closed else.
func served(conn net.Conn, header string) (bool, error) {
	const hello = "hello"
	if _, err := io.WriteString(conn, header+hello); err != nil {
		return false, nil // it is closed already
	}
	got := make([]byte, len(hello))
	n, err := io.ReadFull(conn, got)
	if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		return false, err
	}
	if n > 0 && string(got) != hello {
		return false, fmt.Errorf("got %q, want %q", got[:n], hello)
	}
	return err == nil, nil
}

// headerOf names a client.
func headerOf(ip string) string {
	if strings.Contains(ip, ":") {
		return "PROXY TCP6 " + ip + " 2001:db8::1 4711 443\r\n"
	}
	return "PROXY TCP4 " + ip + " 192.0.2.8 4711 443\r\n"
}

// The limit of the last hop counts the clients, not the proxy that they all come from:
// those who come to the first hop, and those whom a proxy before that one names.
func TestChainLimitsCountClients(t *testing.T) {
	backend := echoBackend(t, nil)
	for n, version := range map[int]string{2: "v1", 3: "v2"} {
		t.Run(fmt.Sprint(n, " hops"), func(t *testing.T) {
			c := plainChain(t, n, backend, version, "max_connections_per_ip 2")
			_, port, _ := net.SplitHostPort(c.hops[0].addr)
			inside := make(map[string][]net.Conn)
			in := 0
			comes := func(ip string, want bool) {
				t.Helper()
				from, addr, header := "127.0.0.1", c.hops[0].addr, headerOf(ip)
				switch {
				case ip == "::1":
					from, addr, header = ip, "[::1]:"+port, ""
				case strings.HasPrefix(ip, "127."):
					from, header = ip, ""
				}
				conn := dialFrom(t, from, addr)
				got, err := served(conn, header)
				if err != nil || got != want {
					t.Errorf("client %s: got served %t, %v; want %t", ip, got, err, want)
				}
				if got {
					in++
					inside[ip] = append(inside[ip], conn)
				} else {
					conn.Close()
				}
				c.waitRoute(t, "all", in)
			}
			for _, ip := range []string{"192.0.2.1", "192.0.2.2", "127.0.0.5", "::1"} {
				comes(ip, true)
				comes(ip, true)
				comes(ip, false)
			}
			comes("::ffff:192.0.2.1", false)
			comes("127.0.0.6", true)
			comes("2001:db8:1:1::1", true)
			comes("2001:db8:1:1:ffff::2", true) // the same /64
			comes("2001:db8:1:1:2::3", false)
			comes("2001:db8:1:2::1", true)
			if got := c.hops[n-1].value(t, `caddy_connections_refused_total{kind="passthrough",reason="max_connections_per_ip",route="all"}`); got != 6 {
				t.Errorf("refused by the last hop: got %v, want 6", got)
			}
			for i, h := range c.hops {
				var all struct{ Connections []connection }
				if h.call(t, http.MethodGet, "/connections?client=192.0.2.1", &all); len(all.Connections) != 2 {
					t.Errorf("hop %d: got %+v, want two of 192.0.2.1", i, all.Connections)
				}
			}
			inside["192.0.2.1"][0].Close()
			in--
			c.waitRoute(t, "all", in)
			comes("192.0.2.1", true)
			comes("192.0.2.1", false)
			for _, conns := range inside {
				for _, conn := range conns {
					conn.Close()
				}
			}
			c.waitEmpty(t)
		})
	}
}

// A client that comes back at once from the same address and port is another connection,
// and its place is its own.
func TestChainSamePort(t *testing.T) {
	visits := long2(20, 200)
	c := plainChain(t, 2, echoBackend(t, nil), "v2", "max_connections_per_ip 1")
	_, port, _ := net.SplitHostPort(freeAddr(t))
	from, err := net.ResolveTCPAddr("tcp", "127.0.0.7:"+port)
	if err != nil {
		t.Fatal(err)
	}
	d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: from, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	var conn *net.TCPConn
	enter := func() (in bool) {
		dialed, err := d.Dial("tcp", c.hops[0].addr)
		if err != nil {
			return false
		}
		conn = dialed.(*net.TCPConn)
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		in, err = served(conn, "")
		if err != nil {
			t.Error(err)
		}
		if !in {
			resetTCP(conn)
		}
		return in
	}
	ids := make([]map[string]bool, len(c.hops))
	for i := range ids {
		ids[i] = make(map[string]bool)
	}
	for i := range visits {
		if !eventually(closeBound, enter) { // the one before may not have gone yet
			t.Fatal("the client is not served again")
		}
		// At the first hop the one before may still be ending: its place is at the last.
		for i, h := range c.hops {
			for _, r := range h.connections(t) {
				if r.Client != "127.0.0.7" {
					t.Errorf("hop %d: got client %s, want 127.0.0.7", i, r.Client)
				}
				ids[i][r.ID] = true
			}
		}
		if all := c.hops[1].connections(t); len(all) != 1 {
			t.Errorf("the last hop: got %+v, want one", all)
		}
		if i%10 == 0 {
			other := dialFrom(t, "127.0.0.7", c.hops[0].addr)
			if in, err := served(other, ""); in || err != nil {
				t.Errorf("another port of the same client: got served %t, %v; want that it is refused", in, err)
			}
			other.Close()
		}
		resetTCP(conn)
	}
	if got := len(ids[1]); got != visits {
		t.Errorf("got %d ids for %d connections", got, visits)
	}
	c.waitEmpty(t)
}

// All clients of a network break off at once and are back at once: each is served, or
// refused because there is no room yet. No place is lost, and nothing of those before is
// left.
func TestChainAllComeBack(t *testing.T) {
	n := long2(1000, 4000)
	c := plainChain(t, 2, echoBackend(t, nil), "v2", fmt.Sprint("max_connections ", n))
	before := c.sockets(t)
	conns := make([]*net.TCPConn, n)
	var in atomic.Int64
	comes := func(i int) {
		d := net.Dialer{Timeout: 30 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%50))}}
		conn, err := d.Dial("tcp", c.hops[0].addr)
		if err != nil {
			t.Error(err)
			return
		}
		_ = conn.SetDeadline(time.Now().Add(60 * time.Second))
		got, err := served(conn, "")
		if err != nil {
			t.Error(err)
		}
		if !got {
			conn.Close()
			return
		}
		in.Add(1)
		conns[i] = conn.(*net.TCPConn)
	}
	resets := func(i int) {
		if conns[i] != nil {
			resetTCP(conns[i])
			conns[i] = nil
		}
	}
	at := func(do ...func(i int)) { // all at once
		gate := make(chan struct{}) // closed when all are ready
		var all sync.WaitGroup
		for i := range n {
			all.Go(func() {
				<-gate
				for _, do := range do {
					do(i)
				}
			})
		}
		close(gate)
		done := make(chan struct{})
		go func() { all.Wait(); close(done) }()
		for {
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
				if got := c.hops[1].stats(t).Total; got > n {
					t.Errorf("got %d connections, want at most %d", got, n)
				}
			}
		}
	}
	at(comes)
	if in.Load() != int64(n) {
		t.Fatalf("got %d served, want all %d", in.Load(), n)
	}
	c.waitRoute(t, "all", n)
	in.Store(0)
	at(resets, comes)
	back := int(in.Load())
	t.Logf("%d of %d clients were served when they came back at once", back, n)
	c.waitRoute(t, "all", back)
	if got := c.hops[1].reasons(t, "all"); got["reset"] < n {
		t.Errorf("the last hop has closed as %v, want %d as reset", got, n)
	}
	at(resets)
	c.waitEmpty(t)
	c.waitSockets(t, before)
	in.Store(0)
	at(comes)
	if in.Load() != int64(n) {
		t.Errorf("after all have gone: got %d served, want %d", in.Load(), n)
	}
	at(resets)
	c.waitEmpty(t)
	if slices.ContainsFunc(conns, func(conn *net.TCPConn) bool { return conn != nil }) {
		t.Error("clients are left")
	}
}
