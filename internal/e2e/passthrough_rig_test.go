// This file has what tests of sni_passthrough share: Caddy with a layer4 server,
// backends that echo, and clients.

package e2e

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// layer4Config is a Caddyfile with a layer4 server at addr that has the given routes,
// beside a plain site.
func (p *proxy) layer4Config(addr, globals, routes string) string {
	return p.siteConfig(fmt.Sprintf("%s\nlayer4 {\n%s {\n%s\n}\n}", globals, addr, routes), "respond ok")
}

// startLayer4 runs Caddy in this process with a layer4 server, and returns its address.
func startLayer4(t testing.TB, globals, routes string) (p *proxy, addr string) {
	t.Helper()
	addr = freeAddr(t)
	return startCaddy(t, fmt.Sprintf("%s\nlayer4 {\n%s {\n%s\n}\n}", globals, addr, routes), "respond ok"), addr
}

// toSNI is a route for a server name; settings follow the directive's name.
func toSNI(name, settings string) string {
	matcher := "@" + strings.ReplaceAll(name, ".", "_")
	return fmt.Sprintf("%s tls sni %s\nroute %s {\nsni_passthrough %s\n}\n", matcher, name, matcher, settings)
}

// toAll is a route for any bytes.
func toAll(settings string) string { return "route {\nsni_passthrough " + settings + "\n}\n" }

// echoBackend echoes bytes, behind TLS if it has a config for that, and ends when its
// client has.
func echoBackend(t testing.TB, conf *tls.Config) string {
	t.Helper()
	return tcpBackend(t, func(conn net.Conn) {
		if conf != nil {
			conn = tls.Server(conn, conf)
		}
		echo(conn)
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite()
		}
	})
}

// tcpBackend gives each connection to serve and closes it afterwards.
func tcpBackend(t testing.TB, serve func(conn net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptTCP(ln, serve, done)
	return ln.Addr().String()
}

// acceptTCP owns the listener's accept loop; closing the listener ends it.
func acceptTCP(ln net.Listener, serve func(net.Conn), done chan<- struct{}) {
	defer close(done)
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(5 * time.Minute)) // longer than any test, also on a busy machine
			serve(conn)
		}()
	}
}

// dialTCP connects a client that gives up after a while.
func dialTCP(t testing.TB, addr string) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return conn.(*net.TCPConn)
}

// dialSNI is a TLS client that asks for a name, and trusts the authority.
func dialSNI(t testing.TB, addr, name string, a *testca.Authority) *tls.Conn {
	t.Helper()
	conn := tls.Client(dialTCP(t, addr), &tls.Config{ServerName: name, RootCAs: a.Pool(), NextProtos: []string{"h2", "http/1.1"}})
	if err := conn.Handshake(); err != nil {
		t.Fatalf("handshake with %s: %v", name, err)
	}
	return conn
}

// wantEcho sends a line and wants it back.
func wantEcho(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatalf("sending: %v", err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("echo: got %q, %v; want %q", got, err, text)
	}
}

// wantEnd wants that the other side closes, be it by a reset, without a byte.
func wantEnd(t testing.TB, conn net.Conn) {
	t.Helper()
	n, err := conn.Read(make([]byte, 1))
	if timeout, ok := err.(net.Error); n > 0 || err == nil || ok && timeout.Timeout() {
		t.Errorf("got %d bytes, %v; want the connection closed", n, err)
	}
}

// waitReason waits until as many more connections as given have ended for a reason.
func (p *proxy) waitReason(t testing.TB, reason string, before, more int) {
	t.Helper()
	var got int
	if !eventually(15*time.Second, func() bool { got = p.stats(t).ClosedByReason[reason] - before; return got >= more }) {
		t.Errorf("closed as %s: got %d, want %d: %+v", reason, got, more, p.stats(t))
	}
}

// plainStatus is what the plain site answers at addr.
func plainStatus(t testing.TB, addr string) int {
	t.Helper()
	conn := dialTCP(t, addr)
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", addr)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}

// headerBackend echoes what follows a PROXY header, which it tells.
func headerBackend(t testing.TB, conf *tls.Config) (addr string, headers chan *proxyproto.Header) {
	t.Helper()
	headers = make(chan *proxyproto.Header, 10)
	return tcpBackend(t, func(conn net.Conn) {
		br := bufio.NewReader(conn)
		h, err := proxyproto.Read(br)
		if err != nil {
			h = nil
		}
		headers <- h
		conn = tls.Server(&bufferedConn{conn, br}, conf)
		echo(conn)
	}), headers
}

// echo sends back what comes. It hides the sockets, for which the net package would keep
// a pipe that looks like a leak.
func echo(conn net.Conn) { _, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}) }
