// This file tests the PROXY protocol between the hops of a chain, and against those who
// get it wrong, or lie (rows C6, C7, C40 and C46 of the seed matrix).

package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// asksSNI is a client, from an address, that asks for a name, after other bytes if there are
// any. It returns an error if there is no handshake, which must not be a timeout.
func asksSNI(t testing.TB, from, addr, before, name string, a *testca.Authority) (*tls.Conn, error) {
	t.Helper()
	conn := dialFrom(t, from, addr)
	if _, err := io.WriteString(conn, before); err != nil {
		return nil, err
	}
	secured := tls.Client(conn, &tls.Config{ServerName: name, RootCAs: a.Pool()})
	err := secured.Handshake()
	if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		t.Errorf("%s: got no answer to the handshake, and no end", name)
	}
	return secured, err
}

// The backend behind three hops learns who the client is, and which name it asked for,
// whatever the versions in between; each hop knows it too.
func TestChainTellsTheClient(t *testing.T) {
	a := testca.New(t)
	backend, headers := headerBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "backend", "*.chain.test")}})
	lanes := []string{"v1-v1-v1", "v2-v2-v2", "v1-v2-v1", "v2-v1-v2"}
	c := startChain(t, 3, func(c *chain, h *hop, i int) string {
		return c.tunnels(h, i, lanes, func(lane string) (string, string) {
			return backend, "proxy_protocol " + strings.Split(lane, "-")[i]
		})
	})
	for _, lane := range lanes {
		conn, err := asksSNI(t, "127.0.0.5", c.hops[0].addr, "", lane+".chain.test", a)
		if err != nil {
			t.Fatalf("%s: %v", lane, err)
		}
		wantEcho(t, conn, "hello")
		h := <-headers
		if h == nil || h.SourceAddr == nil || fmt.Sprint("v", h.Version) != lane[len(lane)-2:] || h.SourceAddr.String() != conn.LocalAddr().String() {
			t.Errorf("%s: the backend got %+v, want %v", lane, h, conn.LocalAddr())
		} else if tlvs, err := h.TLVs(); h.Version == 2 && (err != nil || len(tlvs) != 1 || string(tlvs[0].Value) != lane+".chain.test") {
			t.Errorf("%s: the backend got TLVs %q, %v; want the name", lane, tlvs, err)
		}
		for i, hop := range c.hops {
			if all := hop.connections(t); len(all) != 1 || all[0].Client != "127.0.0.5" || all[0].Route != lane {
				t.Errorf("%s at hop %d: got %+v, want one of 127.0.0.5", lane, i, all)
			}
		}
		conn.Close()
		c.waitEmpty(t)
	}
}

// A hop that does not get what it expects, or cannot read what it gets, ends the
// connection at once, at both hops; nothing hangs.
func TestChainOfMixedProtocols(t *testing.T) {
	const self, client = "127.0.0.1", "127.0.0.5"
	accepts := []struct {
		name, routes     string
		without, withOne string // who the client is, "": it is closed
	}{
		{"nothing", "", self, ""},
		{"proxies", fromProxies, "", client},
		{"required", "route {\nproxy_protocol {\nfallback_policy require\n}\n}\n", "", client},
		{"allowed", "route {\nproxy_protocol {\nallow 127.0.0.0/8\nfallback_policy reject\n}\n}\n", self, client},
		{"of-others", "route {\nproxy_protocol {\nallow 192.0.2.0/24\nfallback_policy reject\n}\n}\n", self, ""},
	}
	a := testca.New(t)
	backend := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "backend", "*.chain.test")}})
	inner := &hop{process: &process{proxy: proxy{addr: freeAddr(t), admin: freeAddr(t)}}}
	var servers, routes strings.Builder
	for _, accept := range accepts {
		addr := freeAddr(t)
		fmt.Fprintf(&servers, "%s {\n%s%s}\n", addr, accept.routes, toSNI("*.chain.test", backend+" {\n name "+accept.name+"\n}"))
		for sent, settings := range map[string]string{"none": "", "v1": "proxy_protocol v1", "v2": "proxy_protocol v2"} {
			routes.WriteString(toSNI(sent+"-"+accept.name+".chain.test", fmt.Sprintf("%s {\n %s\n}", addr, settings)))
		}
	}
	inner.process = startBinaryAt(t, inner.proxy, inner.siteConfig("layer4 {\n"+servers.String()+"}", "respond ok"))
	c := startChain(t, 1, func(_ *chain, h *hop, _ int) string { return h.layer4Config(h.addr, "", routes.String()) })
	c.hops = append(c.hops, inner)
	for _, accept := range accepts {
		for _, sent := range []string{"none", "v1", "v2"} {
			want := accept.withOne
			if sent == "none" {
				want = accept.without
			}
			lane := sent + "-" + accept.name
			conn, err := asksSNI(t, client, c.hops[0].addr, "", lane+".chain.test", a)
			if (err == nil) != (want != "") {
				t.Errorf("%s: got %v, want a handshake: %t", lane, err, want != "")
			}
			if err == nil {
				wantEcho(t, conn, "hello")
				if all := inner.connections(t); len(all) != 1 || all[0].Client != want {
					t.Errorf("%s: got %+v, want one of %s", lane, all, want)
				}
			}
			conn.Close()
			c.waitEmpty(t)
		}
	}
}

// spoofed is a client that no hop may believe in.
const spoofed = "203.0.113.66"

// headerCase is what a peer sends before its TLS.
type headerCase struct {
	name   string
	bytes  string
	silent bool // nothing follows
	// required and allowed are who the client is, if its peer is a proxy that is trusted:
	// where it has to send a header, and where it may. "": it is closed.
	required, allowed string
}

// headerCases are those where true headers name a client.
func headerCases(named string) []headerCase {
	const spoof = "PROXY TCP4 " + spoofed + " 192.0.2.8 4711 443\r\n"
	// v2 is a header with a command, a family and what follows, whose length it may belie.
	v2 := func(command, family byte, length int, rest string) string {
		return "\r\n\r\n\x00\r\nQUIT\n" + string([]byte{command, family, byte(length >> 8), byte(length)}) + rest
	}
	v4 := func(ip string) string { return string(net.ParseIP(ip).To4()) + "\xc0\x00\x02\x08\x12\x67\x01\xbb" }
	wrong := v4(spoofed)
	tlvs := "\x02\x03\xe8" + strings.Repeat("x", 1000)
	return []headerCase{
		{"v1", strings.Replace(spoof, spoofed, named, 1), false, named, named},
		{"v2", v2(0x21, 0x11, 12, v4(named)), false, named, named},
		{"v2, TLVs", v2(0x21, 0x11, 12+len(tlvs), v4(named)+tlvs), false, named, named},
		{"v2, a datagram's", v2(0x21, 0x12, 12, v4(named)), false, named, named},
		{"v2, LOCAL", v2(0x20, 0x11, 12, wrong), false, "127.0.0.1", "127.0.0.1"},
		{"v1, UNKNOWN", "PROXY UNKNOWN " + spoofed + " 192.0.2.8 4711 443\r\n", false, "127.0.0.1", "127.0.0.1"},
		{"none", "", false, "", "127.0.0.1"},

		{"v1, twice", strings.Replace(spoof, spoofed, named, 1) + spoof, false, "", ""},
		{"v1, too long", "PROXY UNKNOWN " + strings.Repeat(spoofed+" ", 8) + "\r\n", false, "", ""},
		{"v1, without an end", "PROXY TCP4 " + strings.Repeat("1", 4000), false, "", ""},
		{"v1, no CR", strings.Replace(spoof, "\r", "", 1), false, "", ""},
		{"v1, lower case", strings.ToLower(spoof), false, "", ""},
		{"v1, unknown family", strings.Replace(spoof, "TCP4", "TCP5", 1), false, "", ""},
		{"v1, another family", strings.Replace(spoof, "TCP4", "TCP6", 1), false, "", ""},
		{"v1, no address", strings.Replace(spoof, spoofed, "192.0.2.300", 1), false, "", ""},
		{"v1, no port", strings.Replace(spoof, "4711", "99999", 1), false, "", ""},
		{"v1, surplus", strings.Replace(spoof, "443", "443 1", 1), false, "", ""},
		{"v2, unknown command", v2(0x2f, 0x11, 12, wrong), false, "", ""},
		{"v2, unknown version", v2(0x11, 0x11, 12, wrong), false, "", ""},
		{"v2, unknown family", v2(0x21, 0x41, 12, wrong), false, "", ""},
		{"v2, unknown transport", v2(0x21, 0x13, 12, wrong), false, "", ""},
		{"v2, no family", v2(0x21, 0x00, 0, ""), false, "", ""},
		{"v2, too short", v2(0x21, 0x11, 4, wrong), false, "", ""},
		{"v2, too short for its family", v2(0x21, 0x21, 12, wrong), false, "", ""},
		{"v2, too long", v2(0x21, 0x11, 60000, wrong), false, "", ""},
		{"garbage", strings.Repeat("\x00\xff\x16garbage", 1000), false, "", ""},

		{"v1, half", spoof[:20], true, "", ""},
		{"v2, half", v2(0x21, 0x11, 12, wrong[:5]), true, "", ""},
		{"v2, less than announced", v2(0x21, 0x11, 1000, wrong), true, "", ""},
		{"three bytes", "PRO", true, "", ""},
		{"half a signature", "\r\n\r\n\x00\r", true, "", ""},
		{"silence", "", true, "", ""},
	}
}

// Whatever comes where a header is expected, or is not: a peer that is no trusted proxy is
// never believed, headers that are wrong end the connection, and neither takes the place of
// another, who is served meanwhile. The first server is as the README says.
func TestChainWrongHeaders(t *testing.T) {
	a := testca.New(t)
	backend := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "backend", "*.chain.test")}})
	const room = 20
	log := filepath.Join(t.TempDir(), "all.log")
	at := proxy{addr: freeAddr(t), admin: freeAddr(t)}
	var servers strings.Builder
	addrs := map[string]string{"required": freeAddr(t), "allowed": freeAddr(t)}
	for name, routes := range map[string]string{
		"required": fromProxies,
		"allowed":  "route {\nproxy_protocol {\ntimeout 3s\nallow 127.0.0.1/32\nfallback_policy reject\n}\n}\n",
	} {
		fmt.Fprintf(&servers, "%s {\nmatching_timeout 3s\n%s%s}\n", addrs[name], routes,
			toSNI("*.chain.test", fmt.Sprintf("%s {\n name %s\n max_connections %d\n log\n}", backend, name, room)))
	}
	p := startBinaryAt(t, at, at.siteConfig("log all {\noutput file "+log+"\nlevel DEBUG\n}\nlayer4 {\n"+servers.String()+"}", "respond ok"))
	good := headerOf("192.0.2.1")
	var lasting []*tls.Conn
	for _, addr := range addrs {
		conn, err := asksSNI(t, "127.0.0.1", addr, good, "lasting.chain.test", a)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(2 * time.Minute)) // until all others have ended
		lasting = append(lasting, conn)
	}
	var all sync.WaitGroup
	for i := range headerCases(spoofed) {
		for server, addr := range addrs {
			tt := headerCases(fmt.Sprint("198.51.100.", 100+i))[i] // each has a client of its own
			trusted := tt.required
			if server == "allowed" {
				tt = headerCases(fmt.Sprint("198.51.100.", 200+i))[i]
				trusted = tt.allowed
			}
			all.Go(func() { p.sendHeader(t, tt, "127.0.0.1", addr, trusted, a) })
			// Who may not send one is served without, and closed with one, which is no TLS.
			stranger := ""
			if tt.bytes == "" && !tt.silent {
				stranger = "127.0.0.2"
			}
			all.Go(func() { p.sendHeader(t, tt, "127.0.0.2", addr, stranger, a) })
		}
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	for open := true; open; {
		select {
		case <-done:
			open = false
		default:
			for _, conn := range lasting {
				wantEcho(t, conn, "still")
			}
			for _, c := range p.connections(t) {
				if c.Client == spoofed {
					t.Errorf("got a client that was only claimed: %+v", c)
				}
			}
		}
	}
	for _, conn := range lasting {
		conn.Close()
	}
	p.waitEmpty(t)
	for name, addr := range addrs {
		for i := range room + 1 {
			_, err := asksSNI(t, "127.0.0.1", addr, good, "full.chain.test", a)
			if (err == nil) != (i < room) {
				t.Errorf("%s: client %d got %v, want room for %d", name, i, err, room)
			}
		}
	}
	text, err := os.ReadFile(log)
	if n := strings.Count(string(text), `"msg":"connection ended"`); err != nil || n < len(lasting) {
		t.Errorf("the log has %d ended connections, %v; want %d at least", n, err, len(lasting))
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, spoofed) {
			t.Errorf("the log names a client that was only claimed: %s", line)
		}
	}
}

// sendHeader is a peer, from an address, that sends a header. want is who the client is
// then, "" if the connection is to be closed.
func (p *process) sendHeader(t *testing.T, tt headerCase, from, addr, want string, a *testca.Authority) {
	what := tt.name + " of " + from
	if tt.silent {
		conn := dialFrom(t, from, addr)
		_, _ = io.WriteString(conn, tt.bytes)
		wantEnd(t, conn)
		return
	}
	conn, err := asksSNI(t, from, addr, tt.bytes, "one.chain.test", a)
	if conn != nil {
		defer conn.Close()
	}
	if (err == nil) != (want != "") {
		t.Errorf("%s: got %v, want a handshake: %t", what, err, want != "")
	}
	if err != nil {
		return
	}
	wantEcho(t, conn, "hello")
	var list struct{ Connections []connection }
	if p.call(t, http.MethodGet, "/connections?client="+want, &list); len(list.Connections) == 0 {
		t.Errorf("%s: got no client %s", what, want)
	}
}

// A header that comes in pieces is read, or ends the connection: v1 wants to be sent at
// once, and whether it came so is not for the sender to say.
func TestChainSplitHeaders(t *testing.T) {
	const named = "198.51.100.7"
	a := testca.New(t)
	backend := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "backend", "*.chain.test")}})
	at := &hop{process: &process{proxy: proxy{addr: freeAddr(t), admin: freeAddr(t)}}, addr: freeAddr(t)}
	p := startBinaryAt(t, at.proxy, at.layer4Config(at.addr, "", fromProxies+toSNI("*.chain.test", backend)))
	for version := byte(1); version <= 2; version++ {
		header, err := proxyproto.HeaderProxyFromAddrs(version, &net.TCPAddr{IP: net.ParseIP(named), Port: 4711}, &net.TCPAddr{IP: net.IP{192, 0, 2, 8}, Port: 443}).Format()
		if err != nil {
			t.Fatal(err)
		}
		for cut := range len(header) {
			conn := dialFrom(t, "127.0.0.1", at.addr)
			_, _ = conn.Write(header[:cut])
			secured := tls.Client(&laterConn{conn, header[cut:]}, &tls.Config{ServerName: "one.chain.test", RootCAs: a.Pool()})
			err := secured.Handshake()
			if err == nil {
				wantEcho(t, secured, "hello")
				if all := p.connections(t); len(all) != 1 || all[0].Client != named {
					t.Errorf("v%d, cut at %d: got %+v, want one of %s", version, cut, all, named)
				}
			}
			if timeout, ok := err.(net.Error); ok && timeout.Timeout() || err != nil && version == 2 {
				t.Errorf("v%d, cut at %d: %v", version, cut, err)
			}
			secured.Close()
			p.waitEmpty(t)
		}
	}
}

// laterConn is a connection that sends some bytes before the first others.
type laterConn struct {
	net.Conn
	first []byte
}

func (c *laterConn) Write(b []byte) (int, error) {
	if first := c.first; len(first) > 0 {
		c.first = nil
		if _, err := c.Conn.Write(first); err != nil {
			return 0, err
		}
	}
	return c.Conn.Write(b)
}

// The README shows how a hop takes clients from the proxies before it.
func TestChainAsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	shown := strings.Join(strings.Fields(string(text)), " ")
	want := strings.Join(strings.Fields(strings.Replace(fromProxies, "127.0.0.1", "10.0.0.0/8", 1)), " ")
	if !strings.Contains(shown, want) {
		t.Errorf("the README does not show %q", want)
	}
}
