// This file follows connections to backends behind TLS through losses, health checks
// and reloads.

package e2e

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// dialed is a handshake as a backend saw it.
type dialed struct {
	request *http.Request
	state   tls.ConnectionState
	peer    string
}

// watches tells of every handshake, and then does as serve does.
func watches(all chan<- dialed, serve script) script {
	return func(r *http.Request, c *rawConn) {
		s := dialed{request: r, peer: c.RemoteAddr().String()}
		if secured, ok := c.Conn.(*tls.Conn); ok {
			s.state = secured.ConnectionState()
		}
		all <- s
		serve(r, c)
	}
}

// nextDial returns the next handshake.
func nextDial(t testing.TB, all <-chan dialed) dialed {
	t.Helper()
	select {
	case s := <-all:
		return s
	case <-time.After(20 * time.Second):
		t.Fatal("no handshake reaches a backend")
		return dialed{}
	}
}

// checkPrivate checks what a backend learned of its peer.
func (s dialed) checkPrivate(t testing.TB, server string) {
	t.Helper()
	if s.state.ServerName != server {
		t.Errorf("server name: got %q, want %q", s.state.ServerName, server)
	}
	if certs := s.state.PeerCertificates; len(certs) != 1 || certs[0].Subject.CommonName != "proxy" {
		t.Errorf("client certificate: got %v, want that of the proxy", certs)
	}
}

// A connection that is resumed is trusted like the first: the same name, also if it is
// one of the request, and the same certificate.
func TestResumeBehindTLS(t *testing.T) {
	settings, conf := private(t, testca.New(t), "right.test")
	var n atomic.Int32
	handshakes := make(chan dialed, 100)
	serve := watches(handshakes, func(r *http.Request, c *rawConn) {
		if c.accept(r) != nil {
			return
		}
		if n.Add(1) > 2 {
			echoFrames(c)
			return
		}
		_, _, _ = c.receive()
		_ = c.Conn.(*tls.Conn).NetConn().Close()
	})
	a, b := tlsBackend(t, conf, serve), tlsBackend(t, conf, serve)
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy wss://%s wss://%s {\n resume_interval 1ms 20ms\n %s tls_server_name {header.X-Tenant}.test\n}", a, b, settings))
	c := rawDial(t, p.addr, "X-Tenant: right\r\n")
	c.send(t, ws.OpText, "hello")
	c.wantText(t, "hello")
	for i := range 3 {
		s := nextDial(t, handshakes)
		s.checkPrivate(t, "right.test")
		if got := s.request.Header.Get("Holdfast-Resume"); (got != "") != (i > 0) {
			t.Errorf("handshake %d: got Holdfast-Resume %q", i, got)
		}
	}
	c.sendClose(t, 1000, "")
	c.hears(t, "client", says{1000, ""})
}

// Health checks are trusted like connections: the ws and the http one.
func TestHealthChecksBehindTLS(t *testing.T) {
	settings, conf := private(t, testca.New(t), "right.test")
	t.Setenv("HOLDFAST_TEST_NAME", "right")
	handshakes := make(chan dialed, 1000)
	backend := tlsBackend(t, conf, watches(handshakes, func(r *http.Request, c *rawConn) {
		if r.Header.Get("Upgrade") == "" {
			answers(response(200, "fine"))(r, c)
			return
		}
		echoRaw(r, c)
	}))
	for _, tt := range []struct {
		name, server string
		healthy      bool
	}{
		{"right name", "right.test", true},
		{"wrong name", "wrong.test", false},
		{"name of the environment", "{env.HOLDFAST_TEST_NAME}.test", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startCaddy(t, "", fmt.Sprintf(
				"websocket_proxy wss://%s {\n %s tls_server_name %s\n health_interval 200ms\n health_timeout 10s\n health_ws /ws\n health_http /http\n}",
				backend, settings, tt.server))
			if !tt.healthy {
				if !eventually(10*time.Second, func() bool {
					res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
					c.Close()
					return res.StatusCode == http.StatusServiceUnavailable
				}) {
					t.Error("an upstream of the wrong name stays healthy")
				}
				return
			}
			paths := make(map[string]bool)
			for range 10 {
				s := nextDial(t, handshakes)
				s.checkPrivate(t, "right.test")
				paths[s.request.URL.Path] = true
			}
			if !paths["/ws"] || !paths["/http"] || len(paths) != 2 {
				t.Errorf("checks: got those of %v, want those of /ws and /http", paths)
			}
			checkEcho(t, rawDial(t, p.addr, ""))
		})
		for len(handshakes) > 0 {
			<-handshakes
		}
	}
}

// Configs are freed although connections that they dialed by TLS live on: with a trust
// pool, a client certificate, health checks, and a name, also one of the request.
func TestTLSLegsKeepNoConfigInMemory(t *testing.T) {
	const clients, reloads = 20, 8
	for name, setting := range map[string]string{
		"name":                "tls_server_name right.test\n health_ws",
		"name of the request": "tls_server_name {header.X-Tenant}.test",
	} {
		t.Run(name, func(t *testing.T) {
			settings, conf := private(t, testca.New(t), "right.test")
			backend := tlsBackend(t, conf, greets)
			p := startCaddy(t, "", "respond ok") // the real config follows
			config := func(n int) string {
				return p.siteConfig("metrics", fmt.Sprintf(
					"config_probe\nheader X-Generation %d\nwebsocket_proxy wss://%s {\n name app\n max_connections %d\n %s %s\n}",
					n, backend, 1000+n, settings, setting))
			}
			configProbes.reset()
			var talking []*rawConn
			for n := range reloads {
				p.reload(t, config(n))
				for range clients {
					talking = append(talking, p.enter(t, "X-Tenant: right\r\n"))
				}
			}
			p.reload(t, config(reloads))
			// The running config has a server and, seen by it, its tls app. Its handler
			// has not been asked yet.
			const running = 2
			var alive int
			if !eventually(20*time.Second, func() bool { runtime.GC(); alive = configProbes.alive(); return alive <= running }) {
				t.Errorf("objects of configs that are still in memory: got %d, want the %d of the running one: %s", alive, running, configProbes.describe())
			}
			for i, c := range talking {
				c.send(t, ws.OpText, fmt.Sprint("still here ", i))
				c.wantText(t, fmt.Sprint("still here ", i))
				c.sendClose(t, 1000, "")
			}
		})
	}
}
