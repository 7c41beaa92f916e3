// This file has backends that want a header of the PROXY protocol: whom it names.

package e2e

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// introduced is a connection as a backend got it: whom the header named, and what
// followed.
type introduced struct {
	header  *proxyproto.Header
	request *http.Request
}

// introductions are those that a backend got.
type introductions chan introduced

// backend is one that wants a header, exactly one, as the first bytes of every
// connection, before TLS if it has a config for that.
func (all introductions) backend(t testing.TB, conf *tls.Config, serve script) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go all.accept(ln, conf, serve, done)
	return ln.Addr().String()
}

// accept owns the listener's accept loop; closing the listener ends it.
func (all introductions) accept(ln net.Listener, conf *tls.Config, serve script, done chan<- struct{}) {
	defer close(done)
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go all.serve(conn, conf, serve)
	}
}

// serve owns one connection until serve returns. A second header would be no request.
func (all introductions) serve(conn net.Conn, conf *tls.Config, serve script) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * time.Minute))
	br := bufio.NewReader(conn)
	header, err := proxyproto.Read(br)
	if err != nil {
		header = nil
	}
	if conf != nil {
		conn = tls.Server(&bufferedConn{conn, br}, conf)
		br = bufio.NewReader(conn)
	}
	r, err := http.ReadRequest(br)
	if err != nil {
		r = nil
	}
	all <- introduced{header, r}
	if r != nil {
		serve(r, &rawConn{Conn: conn, br: br})
	}
}

// bufferedConn is a connection of which something was read into a buffer.
type bufferedConn struct {
	net.Conn
	br *bufio.Reader
}

func (c *bufferedConn) Read(p []byte) (int, error) { return c.br.Read(p) }

// check checks the next connection that a backend got.
func (all introductions) check(t testing.TB, version byte, source netip.AddrPort) introduced {
	t.Helper()
	select {
	case in := <-all:
		if in.header == nil || in.request == nil {
			t.Fatalf("got %+v, want one header and then a request", in)
		}
		if in.header.Version != version {
			t.Errorf("version: got %d, want %d", in.header.Version, version)
		}
		var got netip.AddrPort
		if from, ok := in.header.SourceAddr.(*net.TCPAddr); ok && !in.header.TransportProtocol.IsUnspec() {
			got = from.AddrPort()
		}
		if got != source {
			t.Errorf("source: got %v, want %v", got, source)
		}
		return in
	case <-time.After(20 * time.Second):
		t.Fatal("no backend is dialed")
		return introduced{}
	}
}

// A backend learns the client's address: as a trusted proxy has it, as an incoming
// header has it, else the peer's own.
func TestProxyProtocolToBackends(t *testing.T) {
	const wrapper = "servers {\n listener_wrappers {\n proxy_protocol {\n timeout 5s\n allow 127.0.0.1/32\n fallback_policy reject\n}\n}\n trusted_proxies static 203.0.113.0/24\n}"
	const trusted = "servers {\n trusted_proxies static 127.0.0.1/32\n}"
	conf := &tls.Config{Certificates: []tls.Certificate{testca.New(t).Issue(t, "ip", "127.0.0.1")}}
	for _, version := range []string{"v1", "v2"} {
		for _, tt := range []struct {
			name, globals string
			header        string // of the PROXY protocol, that the client sends
			forwarded     string // X-Forwarded-For, that it sends
			source        string // "": its own address
			conf          *tls.Config
		}{
			{"client", "", "", "", "", nil},
			{"client, TLS", "", "", "", "", conf},
			{"client that is not trusted", "", "", "192.0.2.1", "", nil},
			{"trusted proxy", trusted, "", "192.0.2.1", "192.0.2.1:0", nil},
			{"trusted proxy, TLS", trusted, "", "192.0.2.1", "192.0.2.1:0", conf},
			{"trusted proxy, without a client", trusted, "", "", "", nil},
			{"trusted proxy, IPv6", trusted, "", "2001:db8::1", "[2001:db8::1]:0", nil},
			{"trusted proxy, IPv4 in IPv6", trusted, "", "::ffff:192.0.2.1", "192.0.2.1:0", nil},
			{"incoming header", wrapper, "PROXY TCP4 192.0.2.7 192.0.2.8 4711 443\r\n", "198.51.100.1", "192.0.2.7:4711", nil},
			{"incoming header, IPv6", wrapper, "PROXY TCP6 2001:db8::7 2001:db8::8 4711 443\r\n", "", "[2001:db8::7]:4711", nil},
			{"incoming header of a trusted proxy", wrapper, "PROXY TCP4 203.0.113.9 192.0.2.8 4711 443\r\n", "198.51.100.1", "198.51.100.1:0", nil},
		} {
			t.Run(version+"/"+tt.name, func(t *testing.T) {
				all := make(introductions, 10)
				scheme := "ws://"
				settings := ""
				if tt.conf != nil {
					scheme, settings = "wss://", "tls_insecure_skip_verify\n"
				}
				p := startCaddy(t, tt.globals, fmt.Sprintf("websocket_proxy %s%s {\n proxy_protocol %s\n %s}", scheme, all.backend(t, tt.conf, echoRaw), version, settings))
				extra := ""
				if tt.forwarded != "" {
					extra = "X-Forwarded-For: " + tt.forwarded + "\r\n"
				}
				res, c := rawRequest(t, p.addr, tt.header+rawUpgrade(p.addr, extra))
				if res.StatusCode != http.StatusSwitchingProtocols {
					t.Fatalf("status: got %d, want 101", res.StatusCode)
				}
				source := c.LocalAddr().(*net.TCPAddr).AddrPort()
				if tt.source != "" {
					source = netip.MustParseAddrPort(tt.source)
				}
				all.check(t, version[1]-'0', source)
				checkEcho(t, c)
			})
		}
	}
}

// Every dial has one header: those after a loss name the same client, port included;
// health checks name nobody.
func TestProxyProtocolAtEveryDial(t *testing.T) {
	for _, version := range []string{"v1", "v2"} {
		t.Run(version, func(t *testing.T) {
			all, probes := make(introductions, 100), make(introductions, 1000)
			var n atomic.Int32
			serve := func(r *http.Request, c *rawConn) {
				if n.Add(1) > 2 { // a third one would make the message suspect
					echoRaw(r, c)
				} else if c.accept(r) == nil {
					_, _, _ = c.receive()
					c.Conn.Close()
				}
			}
			a, b := all.backend(t, nil, serve), all.backend(t, nil, serve)
			probe := probes.backend(t, nil, echoRaw)
			_, port, _ := net.SplitHostPort(probe)
			p := startCaddy(t, "", fmt.Sprintf(
				"websocket_proxy %s %s {\n proxy_protocol %s\n resume_interval 1ms 20ms\n health_ws {\n port %s\n}\n}", a, b, version, port))
			c := rawDial(t, p.addr, "")
			c.send(t, ws.OpText, "hello")
			c.wantText(t, "hello")
			source := c.LocalAddr().(*net.TCPAddr).AddrPort()
			for i := range 3 {
				in := all.check(t, version[1]-'0', source)
				if got := in.request.Header.Get("Holdfast-Resume"); (got != "") != (i > 0) {
					t.Errorf("dial %d: got Holdfast-Resume %q", i, got)
				}
			}
			for range 2 { // one of each upstream
				probes.check(t, version[1]-'0', netip.AddrPort{})
			}
			c.sendClose(t, 1000, "")
			c.hears(t, "client", says{1000, ""})
		})
	}
}

// Limits count whom an incoming header names; one of who may not send it is not believed.
func TestProxyProtocolOfOthers(t *testing.T) {
	const wrapper = "servers {\n listener_wrappers {\n proxy_protocol {\n timeout 5s\n allow 127.0.0.1/32\n}\n}\n}"
	p := startCaddy(t, wrapper, "websocket_proxy "+rawBackend(t, echoRaw)+" {\n max_connections_per_ip 1\n}")
	header := func(ip string) string { return "PROXY TCP4 " + ip + " 192.0.2.8 4711 443\r\n" }
	for _, tt := range []struct {
		name, from, header string
		status             int
	}{
		{"client", "127.0.0.1", header("192.0.2.1"), 101},
		{"the same client", "127.0.0.1", header("192.0.2.1"), 429},
		{"another client", "127.0.0.1", header("192.0.2.2"), 101},
		{"no header", "127.0.0.1", "", 101},
		{"no header, again", "127.0.0.1", "", 429},
		{"who may not send one", "127.0.0.2", header("192.0.2.3"), 101},
		{"who may not send one, again", "127.0.0.2", header("192.0.2.4"), 429},
		{"a client that was only claimed", "127.0.0.1", header("192.0.2.4"), 101},
	} {
		if res, _ := p.asks(t, tt.from, tt.header+rawUpgrade(p.addr, "")); res.StatusCode != tt.status {
			t.Errorf("%s: got %d, want %d", tt.name, res.StatusCode, tt.status)
		}
	}
	var clients []string
	for _, c := range p.connections(t) {
		clients = append(clients, c.Client)
	}
	if got := strings.Join(clients, " "); got != "192.0.2.1 192.0.2.2 127.0.0.1 127.0.0.2 192.0.2.4" {
		t.Errorf("clients: got %s", got)
	}
}
