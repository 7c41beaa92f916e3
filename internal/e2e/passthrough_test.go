// This file tests the way of a connection through sni_passthrough.

package e2e

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// Each server name has its backend, whose certificate the client sees; what matches no
// route is closed.
func TestServerNames(t *testing.T) {
	a := testca.New(t)
	backend := func(name string) string {
		return echoBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, name, name)}})
	}
	one, two := backend("one.test"), backend("two.test")
	p, addr := startLayer4(t, "", toSNI("one.test", one)+toSNI("two.test", two))
	second := dialSNI(t, addr, "two.test", a)
	wantEcho(t, second, "hello")
	if got := p.connections(t)[0]; got.Route != addr+"#2" || got.Upstream != two {
		t.Errorf("second route: got %+v, want %s#2", got, addr)
	}
	second.Close()
	p.waitEmpty(t)
	c := dialSNI(t, addr, "one.test", a)
	wantEcho(t, c, "hello")
	got := p.connections(t)
	if len(got) != 1 {
		t.Fatalf("connections: got %+v, want one", got)
	}
	want := connection{
		ID: got[0].ID, Kind: "passthrough", Route: addr + "#1", State: "open", Client: "127.0.0.1", Upstream: one, Dial: one, Protocol: "tcp",
		Age: got[0].Age, Idle: got[0].Idle, BytesIn: got[0].BytesIn, BytesOut: got[0].BytesOut,
	}
	if got[0] != want || got[0].BytesIn == 0 || got[0].BytesOut == 0 {
		t.Errorf("connection: got %+v, want %+v with bytes", got[0], want)
	}
	var shown struct{ SNI string }
	p.call(t, http.MethodGet, "/connections/"+got[0].ID, &shown)
	if shown.SNI != "one.test" {
		t.Errorf("SNI: got %q, want one.test", shown.SNI)
	}
	if status := p.call(t, http.MethodGet, "/connections?kind=passthrough", nil); status != http.StatusOK {
		t.Errorf("filter by kind: got status %d", status)
	}
	other := tls.Client(dialTCP(t, addr), &tls.Config{ServerName: "three.test", RootCAs: a.Pool()})
	if err := other.Handshake(); err == nil {
		t.Error("a name without a route: got a handshake, want none")
	}
	before := p.stats(t).ClosedByReason["eof"]
	_ = c.CloseWrite()
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		t.Errorf("end: got %q, %v; want nothing more", rest, err)
	}
	c.Close()
	p.waitReason(t, "eof", before, 1)
}

// The server name makes the upstream's address.
func TestServerNameInAddress(t *testing.T) {
	a := testca.New(t)
	backend := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "localhost", "localhost")}})
	_, port, _ := net.SplitHostPort(backend)
	p, addr := startLayer4(t, "", toSNI("localhost", "tcp4/{l4.tls.server_name}:"+port))
	c := dialSNI(t, addr, "localhost", a)
	wantEcho(t, c, "hello")
	if got := p.connections(t)[0]; got.Upstream != "tcp4/{l4.tls.server_name}:"+port || got.Dial != "localhost:"+port {
		t.Errorf("upstream: got %q at %q", got.Upstream, got.Dial)
	}
	c.Close()
}

// Bytes arrive as they were sent, both ways at once.
func TestPassthroughIdentity(t *testing.T) {
	const size = 16 << 20
	digests := make(chan [32]byte, 2)
	answer := make([]byte, size)
	rand.Read(answer)
	backend := tcpBackend(t, func(conn net.Conn) {
		go func() { // ends with the connection, at the latest
			_, _ = conn.Write(answer)
			_ = conn.(*net.TCPConn).CloseWrite()
		}()
		h := sha256.New()
		_, _ = io.Copy(h, conn)
		digests <- [32]byte(h.Sum(nil))
	})
	_, addr := startLayer4(t, "", toAll(backend))
	c := dialTCP(t, addr)
	sent := make([]byte, size)
	rand.Read(sent)
	go func() { // ends with the connection, at the latest
		for i := range 1000 { // small ones first
			_, _ = c.Write(sent[i : i+1])
		}
		_, _ = c.Write(sent[1000:])
		_ = c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(answer) {
		t.Errorf("client: got %d bytes, %v; want the backend's %d", len(got), err, size)
	}
	if <-digests != sha256.Sum256(sent) {
		t.Error("backend: got other bytes than the client sent")
	}
}

// A client that has said all gets its answer.
func TestPassthroughHalfClose(t *testing.T) {
	answer := make(chan struct{})
	backend := tcpBackend(t, func(conn net.Conn) {
		all, _ := io.ReadAll(conn)
		<-answer
		_, _ = fmt.Fprintf(conn, "got %d", len(all))
	})
	p, addr := startLayer4(t, "", toAll(backend))
	c := dialTCP(t, addr)
	_, _ = io.WriteString(c, "question")
	if !eventually(10*time.Second, func() bool { return p.stats(t).ByState["open"] == 1 }) {
		t.Fatal("the tunnel is not open")
	}
	_ = c.CloseWrite()
	if !eventually(10*time.Second, func() bool { return p.stats(t).ByState["half_open"] == 1 }) {
		t.Errorf("states: got %v, want half_open", p.stats(t).ByState)
	}
	close(answer)
	if got, err := io.ReadAll(c); err != nil || string(got) != "got 8" {
		t.Errorf("answer: got %q, %v; want %q", got, err, "got 8")
	}
}

// An upstream that refuses, or says nothing at all, is given up, and the next one gets all
// that the client has sent.
func TestPassthroughNextUpstream(t *testing.T) {
	good := echoBackend(t, nil)
	for name, bad := range map[string]string{"refuses": freeAddr(t), "says nothing": fullBacklog(t)} {
		t.Run(name, func(t *testing.T) {
			p, addr := startLayer4(t, "", toAll(bad+" "+good+" {\n lb_policy first\n dial_timeout 500ms\n fail_duration 1m\n}"))
			c := dialTCP(t, addr)
			wantEcho(t, c, "hello")
			if got := p.connections(t)[0].Upstream; got != good {
				t.Errorf("upstream: got %s, want %s", got, good)
			}
			c.Close()
			for _, v := range p.views(t) {
				if v.Healthy != (v.Upstream == good) {
					t.Errorf("upstream: got %+v, want that only %s is healthy", v, good)
				}
			}
		})
	}
}

// If no upstream is left the client is closed; one that leaves first ends the dial.
func TestPassthroughNoUpstream(t *testing.T) {
	p, addr := startLayer4(t, "", toAll(fullBacklog(t)+" {\n dial_timeout 700ms\n}"))
	wantEnd(t, dialTCP(t, addr))
	p.waitEmpty(t)
	addr = freeAddr(t)
	p.reload(t, p.layer4Config(addr, "", toAll(fullBacklog(t)+" {\n dial_timeout 1m\n}")))
	for _, leave := range []func(c *net.TCPConn){
		func(c *net.TCPConn) { _ = c.Close() },
		func(c *net.TCPConn) { _ = c.SetLinger(0); _ = c.Close() },
	} {
		c := dialTCP(t, addr)
		_, _ = io.WriteString(c, "hello")
		if !eventually(10*time.Second, func() bool { return p.stats(t).ByState["connecting"] == 1 }) {
			t.Fatalf("states: got %v, want one that is connecting", p.stats(t).ByState)
		}
		leave(c)
		p.waitEmpty(t)
	}
}

// One client more than the limits allow is closed; there is room again when one has gone.
func TestPassthroughLimits(t *testing.T) {
	backend := echoBackend(t, nil)
	for name, limit := range map[string]string{
		"of the route":    "max_connections 1",
		"of a client":     "max_connections_per_ip 1",
		"of the upstream": "upstream_max_connections 1",
	} {
		t.Run(name, func(t *testing.T) {
			p, addr := startLayer4(t, "", toAll(backend+" {\n "+limit+"\n}"))
			c := dialTCP(t, addr)
			wantEcho(t, c, "hello")
			wantEnd(t, dialTCP(t, addr))
			c.Close()
			p.waitEmpty(t)
			again := dialTCP(t, addr)
			wantEcho(t, again, "hello")
			again.Close()
		})
	}
}

// A backend learns who the client is, which name it asked for and which protocol it
// offered first. (Those behind an incoming header run the binary: caddy-l4 v0.1.2 has a
// data race of its own there, in a debug message.)
func TestPassthroughProxyProtocol(t *testing.T) {
	a := testca.New(t)
	backend, headers := headerBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "one.test", "one.test")}})
	check := func(t *testing.T, version byte, source string) {
		t.Helper()
		h := <-headers
		if h == nil || h.Version != version || h.SourceAddr.String() != source {
			t.Fatalf("header: got %+v, want version %d from %s", h, version, source)
		}
		if version == 1 {
			return
		}
		tlvs, err := h.TLVs()
		got := make(map[proxyproto.PP2Type]string)
		for _, v := range tlvs {
			got[v.Type] = string(v.Value)
		}
		if err != nil || len(got) != 2 || got[proxyproto.PP2_TYPE_AUTHORITY] != "one.test" || got[proxyproto.PP2_TYPE_ALPN] != "h2" {
			t.Errorf("TLVs: got %q, %v; want one.test and h2", got, err)
		}
	}
	for version := byte(1); version <= 2; version++ {
		settings := fmt.Sprintf("%s {\n proxy_protocol v%d\n}", backend, version)
		t.Run(fmt.Sprint("v", version), func(t *testing.T) {
			_, addr := startLayer4(t, "", toSNI("one.test", settings))
			c := dialSNI(t, addr, "one.test", a)
			check(t, version, c.LocalAddr().String())
			wantEcho(t, c, "hello")
			c.Close()
		})
		t.Run(fmt.Sprint("v", version, " behind another proxy"), func(t *testing.T) {
			addr := freeAddr(t)
			p := startBinary(t, "layer4 {\n"+addr+" {\nroute {\nproxy_protocol {\nallow 127.0.0.0/8\nfallback_policy reject\n}\n}\n"+toSNI("one.test", settings)+"}\n}", "respond ok")
			conn := dialTCP(t, addr)
			_, _ = io.WriteString(conn, "PROXY TCP4 192.0.2.7 192.0.2.8 4711 443\r\n")
			c := tls.Client(conn, &tls.Config{ServerName: "one.test", RootCAs: a.Pool(), NextProtos: []string{"h2"}})
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			check(t, version, "192.0.2.7:4711")
			wantEcho(t, c, "hello")
			if got := p.connections(t)[0].Client; got != "192.0.2.7" {
				t.Errorf("client: got %s, want 192.0.2.7", got)
			}
			c.Close()
			p.waitEmpty(t)
		})
	}
}

// As a listener wrapper it shares a port with HTTP: what matches is passed on, the rest is
// served.
func TestPassthroughBesideHTTP(t *testing.T) {
	a := testca.New(t)
	backend := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "one.test", "one.test")}})
	p := startBinary(t, "servers {\nlistener_wrappers {\nlayer4 {\n"+toSNI("one.test", backend)+"}\n}\n}", "respond ok")
	c := dialSNI(t, p.addr, "one.test", a)
	wantEcho(t, c, "hello")
	if status := plainStatus(t, p.addr); status != http.StatusOK {
		t.Errorf("HTTP: got status %d, want 200", status)
	}
	got := p.connections(t)
	if _, port, _ := net.SplitHostPort(p.addr); len(got) != 1 || got[0].Route != "layer4/:"+port+"#1" || got[0].Upstream != backend {
		t.Errorf("connections: got %+v, want one to %s", got, backend)
	}
	wantEcho(t, c, "hello again")
	c.Close()
	p.waitEmpty(t)
}

// Each connection has its entry in the access log, at its end: those that ended well, and
// those that never got to an upstream.
func TestPassthroughAccessLog(t *testing.T) {
	a := testca.New(t)
	backend := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "one.test", "one.test")}})
	dead := freeAddr(t)
	file := filepath.Join(t.TempDir(), "access.log")
	globals := "log tunnels {\noutput file " + file + "\nlevel INFO\ninclude layer4.handlers.sni_passthrough\n}"
	addr := freeAddr(t)
	// The binary, because Caddy closes a log with the next config only.
	p := startBinary(t, globals+"\nlayer4 {\n"+addr+" {\n"+
		toSNI("one.test", backend+" {\n name good\n log\n}")+toSNI("two.test", dead+" {\n name bad\n log\n}")+"}\n}", "respond ok")
	c := dialSNI(t, addr, "one.test", a)
	wantEcho(t, c, "hello")
	_ = c.CloseWrite()
	_, _ = io.ReadAll(c)
	c.Close()
	p.waitEmpty(t)
	if err := tls.Client(dialTCP(t, addr), &tls.Config{ServerName: "two.test", RootCAs: a.Pool()}).Handshake(); err == nil {
		t.Error("got a handshake with nobody")
	}
	type entry struct {
		Msg, ID, Route, SNI, Remote, Upstream, Dial, Reason string
		Duration                                            float64
		BytesIn                                             int `json:"bytes_in"`
		BytesOut                                            int `json:"bytes_out"`
	}
	var got []entry
	if !eventually(10*time.Second, func() bool {
		got = nil
		text, _ := os.ReadFile(file)
		for line := range strings.Lines(string(text)) {
			var e entry
			if json.Unmarshal([]byte(line), &e) == nil && e.Msg == "connection ended" {
				got = append(got, e)
			}
		}
		return len(got) >= 2
	}) {
		t.Fatalf("entries: got %+v, want two", got)
	}
	for i, want := range []entry{
		{Route: "good", SNI: "one.test", Upstream: backend, Dial: backend, Reason: "eof"},
		{Route: "bad", SNI: "two.test", Upstream: dead, Dial: dead, Reason: "dial"},
	} {
		e := got[i]
		if (e.BytesIn > 500 && e.BytesOut > 500) != (i == 0) || e.Duration <= 0 || e.ID == "" {
			t.Errorf("entry %d: got %+v, want its bytes, duration and id", i, e)
		}
		want.Msg, want.ID, want.Remote, want.Duration, want.BytesIn, want.BytesOut = e.Msg, e.ID, "127.0.0.1", e.Duration, e.BytesIn, e.BytesOut
		if e != want {
			t.Errorf("entry %d: got %+v, want %+v", i, e, want)
		}
	}
}
