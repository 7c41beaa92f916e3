// This file has chains of proxies: each hop is a Caddy of its own, a process that can be
// killed and started again. A chain has several lanes: server names, each with a route of
// its own at every hop.

package e2e

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// fromProxies has the proxies of 127.0.0.1 begin with a PROXY header, and nobody else
// believed, as the README says.
const fromProxies = "@proxies remote_ip 127.0.0.1\nroute @proxies {\nproxy_protocol {\ntimeout 3s\nfallback_policy require\n}\n}\n"

// closeBound is how long the end of a connection may take to be known at every hop, on
// a machine that is busy. It takes some milliseconds on one that is not.
const closeBound = 15 * time.Second

// hop is one proxy of a chain: several processes, one after the other, with the same
// addresses.
type hop struct {
	*process
	addr string // of the server that belongs to the chain
}

// chain is a row of proxies; clients meet the first one.
type chain struct {
	hops   []*hop
	config func(h *hop, i int) string // the Caddyfile of a hop
}

// startChain runs n proxies. config makes the Caddyfile of each, with its place.
func startChain(t testing.TB, n int, config func(c *chain, h *hop, i int) string) *chain {
	t.Helper()
	c := new(chain)
	c.config = func(h *hop, i int) string { return config(c, h, i) }
	for range n {
		at := proxy{addr: freeAddr(t), admin: freeAddr(t)}
		c.hops = append(c.hops, &hop{&process{proxy: at}, freeAddr(t)})
	}
	for i := range c.hops {
		c.start(t, i)
	}
	return c
}

// start starts the process of a hop, which has none or has ended.
func (c *chain) start(t testing.TB, i int) {
	t.Helper()
	h := c.hops[i]
	h.process = startBinaryAt(t, h.proxy, c.config(h, i))
}

// last reports whether a hop is the one next to the backends.
func (c *chain) last(i int) bool { return i == len(c.hops)-1 }

// tunnels is the Caddyfile of a hop with one route for each of some lanes. Those of the
// first hop take anybody; others want the hop before to say who the client is, by v2 of
// the PROXY protocol unless the settings of the lane have another. to is its backend.
func (c *chain) tunnels(h *hop, i int, lanes []string, settings func(lane string) (to, more string)) string {
	var routes strings.Builder
	if i > 0 {
		routes.WriteString(fromProxies)
	}
	for _, lane := range lanes {
		to, more := settings(lane)
		if !c.last(i) {
			to = c.hops[i+1].addr
			if !strings.Contains(more, "proxy_protocol") {
				more += "\n proxy_protocol v2"
			}
		}
		routes.WriteString(toSNI(lane+".chain.test", fmt.Sprintf("%s {\n name %s\n %s\n}", to, lane, more)))
	}
	return h.layer4Config(h.addr, "metrics", routes.String())
}

// waitRoute waits until a route has n connections at each hop, but for those left out.
func (c *chain) waitRoute(t testing.TB, route string, n int, but ...int) {
	t.Helper()
	for i, h := range c.hops {
		if slices.Contains(but, i) {
			continue
		}
		var s stats
		if !eventually(closeBound, func() bool { s = h.stats(t); return s.ByRoute[route] == n }) {
			t.Errorf("%s at hop %d of %d: got %d connections, want %d: %+v", route, i, len(c.hops), s.ByRoute[route], n, h.connections(t))
		}
	}
}

// waitEmpty waits until no hop has a connection, but for those left out.
func (c *chain) waitEmpty(t testing.TB, but ...int) {
	t.Helper()
	for i, h := range c.hops {
		var s stats
		if !slices.Contains(but, i) && !eventually(closeBound, func() bool { s = h.stats(t); return s.Total == 0 }) {
			t.Errorf("hop %d of %d: connections left: %+v: %+v", i, len(c.hops), s, h.connections(t))
		}
	}
}

// reasons are why the connections of a route have ended at a hop, and how many.
func (h *hop) reasons(t testing.TB, route string) map[string]int {
	t.Helper()
	all := make(map[string]int)
	for _, line := range grep(h.scrape(t), "caddy_connections_closed_total{") {
		var n int
		series, value, _ := strings.Cut(line, "} ")
		_, reason, _ := strings.Cut(series, `reason="`)
		reason, _, _ = strings.Cut(reason, `"`)
		if _, err := fmt.Sscan(value, &n); err == nil && strings.Contains(series, fmt.Sprintf("route=%q", route)) && n > 0 {
			all[reason] += n
		}
	}
	return all
}

// waitSockets waits until no hop has more sockets than before.
func (c *chain) waitSockets(t testing.TB, before []int) {
	t.Helper()
	for i, h := range c.hops {
		n := 0
		if !eventually(closeBound, func() bool { n = h.sockets(t); return n <= before[i] }) {
			t.Errorf("hop %d: got %d sockets, want no more than before: %d", i, n, before[i])
		}
	}
}

// sockets is how many each hop has.
func (c *chain) sockets(t testing.TB) (all []int) {
	t.Helper()
	for _, h := range c.hops {
		all = append(all, h.sockets(t))
	}
	return all
}

// laneBackend echoes, and can end the connections of a lane.
type laneBackend struct {
	addr string

	mu    sync.Mutex // protects conns
	conns map[string][]*net.TCPConn
}

func startLaneBackend(t testing.TB, conf *tls.Config) *laneBackend {
	t.Helper()
	b := &laneBackend{conns: make(map[string][]*net.TCPConn)}
	b.addr = tcpBackend(t, func(conn net.Conn) {
		secured := tls.Server(conn, conf)
		if secured.Handshake() != nil {
			return
		}
		lane, _, _ := strings.Cut(secured.ConnectionState().ServerName, ".")
		b.change(lane, conn.(*net.TCPConn), true)
		defer b.change(lane, conn.(*net.TCPConn), false)
		echo(secured)
		_ = secured.CloseWrite()
	})
	return b
}

func (b *laneBackend) change(lane string, conn *net.TCPConn, has bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if has {
		b.conns[lane] = append(b.conns[lane], conn)
		return
	}
	b.conns[lane] = slices.DeleteFunc(b.conns[lane], func(c *net.TCPConn) bool { return c == conn })
}

// each gives the connections of a lane to end.
func (b *laneBackend) each(lane string, end func(conn *net.TCPConn)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.conns[lane] {
		end(c)
	}
}

// count is how many connections a lane has.
func (b *laneBackend) count(lane string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.conns[lane])
}

// laneClient is a client that, as most do, reads until it hears the end and closes then.
type laneClient struct {
	*tls.Conn
	tcp  *net.TCPConn
	done chan struct{} // closed by read, with err
	err  error         // what it heard
}

// enter opens a client of a lane, whose echo comes.
func (c *chain) enter(t testing.TB, lane string, a *testca.Authority) *laneClient {
	t.Helper()
	conn := dialSNI(t, c.hops[0].addr, lane+".chain.test", a)
	wantEcho(t, conn, "hello")
	return &laneClient{Conn: conn, tcp: conn.NetConn().(*net.TCPConn), done: make(chan struct{})}
}

// read ends with the connection.
func (c *laneClient) read() {
	defer close(c.done)
	_, c.err = io.Copy(io.Discard, c.Conn)
	c.Close()
}

// ended wants that the client, which reads, has heard the end: one that it cannot take for
// a good one, if reset is true.
func (c *laneClient) ended(t testing.TB, what string, reset bool) {
	t.Helper()
	select {
	case <-c.done:
	case <-time.After(closeBound):
		t.Errorf("%s: the client hears no end", what)
		return
	}
	if timeout, ok := c.err.(net.Error); ok && timeout.Timeout() {
		t.Errorf("%s: the client got no end, but %v", what, c.err)
	}
	if reset && !errors.Is(c.err, syscall.ECONNRESET) {
		t.Errorf("%s: the client got %v, want a reset", what, c.err)
	}
}

// resetTCP breaks a connection.
func resetTCP(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// python is a process of Debian's Python, to be killed; it has said that it is ready.
func python(t testing.TB, script string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(tool(t, "/usr/bin/python3"), append([]string{"-c", script}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	ready := make(chan string, 1)
	go func() { // ends with the process, at the latest
		line, _ := bufio.NewReader(out).ReadString('\n')
		ready <- line
	}()
	select {
	case line := <-ready:
		if line != "ready\n" {
			t.Fatalf("Python said %q, want that it is ready", line)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Python does not get ready")
	}
	return cmd
}

// pythonEcho echoes by TLS, at an address, with a certificate and a key.
const pythonEcho = `
import asyncio, ssl, sys
async def echo(r, w):
    try:
        while data := await r.read(65536):
            w.write(data)
            await w.drain()
    except OSError:
        pass
    finally:
        w.close()
async def main():
    ctx = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ctx.load_cert_chain(sys.argv[2], sys.argv[3])
    host, _, port = sys.argv[1].rpartition(":")
    server = await asyncio.start_server(echo, host, int(port), ssl=ctx)
    print("ready", flush=True)
    await server.serve_forever()
asyncio.run(main())
`

// pythonTLSClients makes connections to an address, for a server name, that echo, and
// keeps them.
const pythonTLSClients = `
import socket, ssl, sys, time
host, _, port = sys.argv[1].rpartition(":")
ctx = ssl.create_default_context()
ctx.check_hostname, ctx.verify_mode = False, ssl.CERT_NONE
conns = []
for _ in range(int(sys.argv[3])):
    c = ctx.wrap_socket(socket.create_connection((host, int(port))), server_hostname=sys.argv[2])
    c.sendall(b"hello")
    assert c.recv(5) == b"hello"
    conns.append(c)
print("ready", flush=True)
time.sleep(600)
`
