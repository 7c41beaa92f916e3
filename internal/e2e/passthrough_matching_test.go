// This file tests that matching and what it has read leaves nothing behind, neither on
// tunnels nor on what is served beside them.

package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// The time that matching may take does not bound the life of a tunnel without traffic.
func TestPassthroughOutlivesMatching(t *testing.T) {
	a := testca.New(t)
	cert := a.Issue(t, "one.test", "one.test")
	layer4 := "layer4 {\n"
	addrs := make([]string, len(carriers))
	for i, c := range carriers {
		var conf *tls.Config
		if c.backendTLS {
			conf = &tls.Config{Certificates: []tls.Certificate{cert}}
		}
		addrs[i] = freeAddr(t)
		layer4 += addrs[i] + " {\nmatching_timeout 2s\n" + c.routes(echoBackend(t, conf)) + "}\n"
	}
	p := startCaddy(t, "auto_https disable_redirects\n"+layer4+"}", "respond ok\n"+siteOf(a, "one.test", port(freeAddr(t)), "respond ok"))
	conns := make([]net.Conn, len(carriers))
	for i, c := range carriers {
		if conns[i] = dialTCP(t, addrs[i]); c.clientTLS {
			conns[i] = dialSNI(t, addrs[i], "one.test", a)
		}
		wantEcho(t, conns[i], "hello")
	}
	p.waitIdle(t, len(conns), 3)
	for i, c := range carriers {
		wantEcho(t, conns[i], "after a while, "+c.name)
		conns[i].Close()
	}
}

// As a listener wrapper it shares a port with HTTPS: a name that matches is passed on, the
// others are Caddy's, with its certificate, over HTTP/1.1 and HTTP/2, WebSockets included. Both
// outlive matching and a reload. (The binary, because of caddy-l4's data race in its wrapper.)
func TestPassthroughBesideHTTPS(t *testing.T) {
	a := testca.New(t)
	theirs, own := a.Issue(t, "one.test", "one.test"), a.Issue(t, "other.test", "other.test")
	backend := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{theirs}})
	_, port, _ := net.SplitHostPort(freeAddr(t))
	addr := "127.0.0.1:" + port
	globals := "auto_https disable_redirects\nservers :" + port + " {\nprotocols h1 h2\nlistener_wrappers {\nlayer4 {\nmatching_timeout 2s\n" +
		toSNI("one.test", backend) + "}\ntls\n}\n}"
	talks := startCoderBackend(t)
	site := func(text string) string {
		return "respond ok\n" + siteOf(a, "other.test", port, "route {\nwebsocket_proxy "+talks+"\nrespond "+text+"\n}")
	}
	p := startBinary(t, globals, site("first"))
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: a.Pool()},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
		DisableKeepAlives: true,
	}
	h2 := transport.Clone()
	h2.ForceAttemptHTTP2 = true
	gets := func(want string) {
		t.Helper()
		for version, client := range map[int]*http.Client{1: {Transport: transport}, 2: {Transport: h2}} {
			req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "https://other.test:"+port, nil)
			res, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			res.Body.Close()
			if err != nil || string(body) != want || res.ProtoMajor != version {
				t.Errorf("HTTP/%d: got %q by HTTP/%d, %v; want %q", version, body, res.ProtoMajor, err, want)
			}
			if !slices.Equal(res.TLS.PeerCertificates[0].Raw, own.Certificate[0]) {
				t.Errorf("HTTP/%d: got another certificate than Caddy's", version)
			}
		}
	}
	var tunnels []*tls.Conn
	var sockets []*websocket.Conn
	passed := func() *tls.Conn {
		t.Helper()
		c := dialSNI(t, addr, "one.test", a)
		if !slices.Equal(c.ConnectionState().PeerCertificates[0].Raw, theirs.Certificate[0]) {
			t.Error("passed on: got another certificate than the backend's")
		}
		return c
	}
	upgraded := func() *websocket.Conn {
		t.Helper()
		c, res, err := websocket.Dial(ctx, fmt.Sprintf("wss://other.test:%s/echo?case=%d", port, len(sockets)), &websocket.DialOptions{HTTPClient: &http.Client{Transport: transport}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.CloseNow() })
		if !slices.Equal(res.TLS.PeerCertificates[0].Raw, own.Certificate[0]) {
			t.Error("WebSocket: got another certificate than Caddy's")
		}
		return c
	}
	live := func(when string) {
		t.Helper()
		for _, c := range tunnels {
			wantEcho(t, c, when)
		}
		for _, c := range sockets {
			if err := c.Write(ctx, websocket.MessageText, []byte(when)); err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			if _, got, err := c.Read(ctx); err != nil || string(got) != when {
				t.Fatalf("%s: got %q, %v", when, got, err)
			}
		}
	}
	for _, text := range []string{"first", "second"} {
		if text != "first" {
			p.reload(t, p.siteConfig(globals, site(text)))
			live("after the reload")
		}
		tunnels, sockets = append(tunnels, passed()), append(sockets, upgraded())
		gets(text)
		live("with the " + text)
	}
	p.waitIdle(t, 4, 3)
	live("after a while")
	kinds := make(map[string]int)
	for _, c := range p.connections(t) {
		kinds[c.Kind+" of "+c.Route+" at "+c.Upstream]++
	}
	if len(kinds) != 2 || kinds["passthrough of layer4/:"+port+"#1 at "+backend] != 2 || kinds["websocket of https://other.test:"+port+"#1 at "+talks] != 2 {
		t.Errorf("connections: got %v, want two of each route", kinds)
	}
	for i := range tunnels {
		tunnels[i].Close()
		if err := sockets[i].Close(websocket.StatusNormalClosure, ""); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	p.waitEmpty(t)
}

// waitIdle waits until there are n connections, and for some seconds nothing on any of them.
func (p *proxy) waitIdle(t testing.TB, n int, seconds float64) {
	t.Helper()
	var all []connection
	if !eventually(30*time.Second, func() bool {
		all = p.connections(t)
		return len(all) != n || !slices.ContainsFunc(all, func(c connection) bool { return c.Idle <= seconds })
	}) || len(all) != n {
		t.Fatalf("connections: got %+v, want %d that are idle", all, n)
	}
}

// siteOf follows the body of the plain site: another one, over TLS, with the certificate that
// the authority has issued for its name.
func siteOf(a *testca.Authority, name, port, body string) string {
	return fmt.Sprintf("}\nhttps://%s:%s {\ntls %s %s\n%s\n", name, port, a.File(name+".crt"), a.File(name+".key"), body)
}
