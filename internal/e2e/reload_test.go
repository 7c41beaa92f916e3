package e2e

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/gobwas/ws"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddytls"

	holdfast "github.com/holdfast-proxy/caddy-holdfast"
)

// 200 clients chat, half of them over TLS, while the config is reloaded 20 times
// through the admin API: none is dropped, no message is lost or repeated, and
// the old configs are gone from memory while their connections live on.
func TestReloadKeepsConnections(t *testing.T) {
	const clients, reloads = 200, 20
	p := startCaddy(t, "", "respond ok") // the real config follows
	secure := freeAddr(t)
	_, securePort, _ := net.SplitHostPort(secure)
	backend := rawBackend(t, echoRaw)
	config := func(n int) string {
		return p.siteConfig("metrics\nskip_install_trust", fmt.Sprintf("log {\n output discard\n}\nconfig_probe\nheader X-Generation %d\nwebsocket_proxy %s", n, backend)) +
			fmt.Sprintf("https://localhost:%s {\n tls internal\n log {\n output discard\n}\n config_probe\n header X-Generation %d\n websocket_proxy %s\n}\n", securePort, n, backend)
	}
	// Caddy itself keeps the config under which it made its certificates; the one
	// that accepts the connections is another.
	p.reload(t, config(0))
	insecure := &tls.Config{ServerName: "localhost", InsecureSkipVerify: true} //nolint:gosec // the CA was made a moment ago
	if !eventually(20*time.Second, func() bool {
		conn, err := tls.Dial("tcp", secure, insecure)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}) {
		t.Fatal("no certificate is issued")
	}
	configProbes.reset()
	p.reload(t, config(1))

	var all []*resident
	for i := range clients {
		if i%2 == 1 {
			all = append(all, enterSecure(t, secure, insecure))
		} else {
			all = append(all, enterAt(t, p.addr, "/"))
		}
	}
	for n := range reloads {
		p.reload(t, config(n+2))
		if wantChatting(t, all...); t.Failed() {
			t.Fatalf("after reload %d", n)
		}
	}
	if got := p.stats(t).ByState["open"]; got != clients {
		t.Errorf("open connections after %d reloads: got %d, want %d", reloads, got, clients)
	}
	// The running config has one generation of probes; the clients still chat.
	var alive int
	if !eventually(20*time.Second, func() bool { runtime.GC(); alive = configProbes.alive(); return alive <= configProbes.perConfig() }) {
		t.Errorf("objects of configs that are still in memory: got %d, want the %d of the running one: %s",
			alive, configProbes.perConfig(), configProbes.describe())
	}
	finish(t, all...)
	var messages int64
	for _, r := range all {
		messages += r.echoed.Load()
	}
	t.Logf("%d messages echoed over %d reloads", messages, reloads)
}

// A route that leaves the config takes its connections with it, paced; one that
// comes back in time keeps them. The others are not concerned.
func TestReloadRouteGone(t *testing.T) {
	backend := rawBackend(t, echoRaw)
	site := func(routes string) string { return routes + "\nrespond next" }
	route := func(name string) string {
		return fmt.Sprintf("handle /%s {\n websocket_proxy %s {\n name %s\n }\n}\n", name, backend, name)
	}
	globals := "connection_registry {\n orphan_timeout 400ms\n}"
	p := startCaddy(t, globals, site(route("stays")+route("goes")))
	dial := func(path string) *rawConn {
		res, c := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, ""), "/chat?x=1", path, 1))
		if res.StatusCode != 101 {
			t.Fatalf("%s: status %d", path, res.StatusCode)
		}
		return c
	}
	stays, goes, other := dial("/stays"), dial("/goes"), dial("/goes")
	before := p.stats(t)
	began := time.Now()
	p.reload(t, p.siteConfig(globals, site(route("stays"))))
	var closed []time.Time
	for _, c := range []*rawConn{goes, other} {
		code, _, _, err := c.receiveClose()
		if err != nil || code != 1001 {
			t.Errorf("close of a route that is gone: got %d, %v; want 1001", code, err)
		}
		closed = append(closed, time.Now())
		c.sendClose(t, code, "")
	}
	wantPaced(t, closed, began, 400*time.Millisecond)
	stays.send(t, ws.OpText, "still here")
	if _, got, err := stays.receive(); err != nil || got != "still here" {
		t.Errorf("route that stayed: got %q, %v", got, err)
	}
	p.waitCount(t, 1)
	if got := p.stats(t).ClosedByReason["orphan"] - before.ClosedByReason["orphan"]; got != 2 {
		t.Errorf("connections closed as orphan: got %d, want 2", got)
	}
}

// New settings of a route count for its live connections at once.
func TestReloadSettingsReachLiveConnections(t *testing.T) {
	backend := rawBackend(t, echoRaw)
	site := func(settings string) string {
		return "websocket_proxy " + backend + " {\n" + settings + "\n}"
	}
	p := startCaddy(t, "", site(""))
	c := rawDial(t, p.addr, "")
	p.reload(t, p.siteConfig("", site("idle_timeout 200ms")))
	code, reason, _, err := c.receiveClose()
	if err != nil || code != 1001 || reason != "idle" {
		t.Errorf("close: got %d %q, %v; want 1001 idle", code, reason, err)
	}
	c.sendClose(t, 1001, "")
}

// A reload that fails leaves everything as it was.
func TestFailedReload(t *testing.T) {
	backend := rawBackend(t, echoRaw)
	p := startCaddy(t, "", "websocket_proxy "+backend)
	c := rawDial(t, p.addr, "")
	// It provisions, replaces the route, and cannot start: its second listener is taken.
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	bad := p.siteConfig("", "websocket_proxy "+backend+" {\n name other\n idle_timeout 1ms\n}") +
		fmt.Sprintf("http://%s {\n bind 127.0.0.1\n respond taken\n}\n", taken.Addr())
	if status, _ := p.submit(t, "text/caddyfile", []byte(bad)); status == http.StatusOK {
		t.Fatal("the bad config was loaded")
	}
	c.send(t, ws.OpText, "still here")
	if _, got, err := c.receive(); err != nil || got != "still here" {
		t.Errorf("got %q, %v", got, err)
	}
	if s := p.stats(t); s.Total != 1 {
		t.Errorf("connections: got %+v, want the one", s)
	}
	// New connections are served by the old config.
	d := rawDial(t, p.addr, "")
	d.send(t, ws.OpText, "new")
	if _, got, err := d.receive(); err != nil || got != "new" {
		t.Errorf("new connection: got %q, %v", got, err)
	}
}

// waitCount waits until the registry has n connections.
func (p *proxy) waitCount(t testing.TB, n int) {
	t.Helper()
	var s stats
	if !eventually(10*time.Second, func() bool { s = p.stats(t); return s.Total == n }) {
		t.Errorf("connections: got %d, want %d", s.Total, n)
	}
}

// enterSecure lets a client in by TLS.
func enterSecure(t testing.TB, addr string, conf *tls.Config) *resident {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := conn.Write([]byte(rawUpgrade(conf.ServerName, ""))); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("handshake: %v %v", res, err)
	}
	c := &rawConn{Conn: conn, br: br, client: true}
	return settle(t, &resident{conn: c, speak: c.speak, leave: c.bye})
}

// configProbe is a handler that remembers, weakly, what its config is made of.
type configProbe struct{}

var configProbes probes

// probes are weak pointers to objects of every config that was loaded.
type probes struct {
	mu      sync.Mutex
	servers []weak.Pointer[caddyhttp.Server]
	tls     []weak.Pointer[caddytls.TLS]
	handler []weak.Pointer[holdfast.WebSocketProxy]
}

func init() {
	caddy.RegisterModule(configProbe{})
	httpcaddyfile.RegisterHandlerDirective("config_probe", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return configProbe{}, nil
	})
	httpcaddyfile.RegisterDirectiveOrder("config_probe", httpcaddyfile.Before, "respond")
}

func (configProbe) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.config_probe", New: func() caddy.Module { return new(configProbe) }}
}

func (configProbe) Provision(ctx caddy.Context) error {
	app, err := ctx.App("tls")
	if err != nil {
		return err
	}
	server := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	configProbes.mu.Lock()
	defer configProbes.mu.Unlock()
	configProbes.tls = append(configProbes.tls, weak.Make(app.(*caddytls.TLS)))
	configProbes.servers = append(configProbes.servers, weak.Make(server))
	return nil
}

func (configProbe) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	// At the first request everything is provisioned and the handlers can be seen.
	server := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	configProbes.mu.Lock()
	configProbes.addHandlers(server.Routes)
	configProbes.mu.Unlock()
	return next.ServeHTTP(w, r)
}

// addHandlers finds the plugin's handlers in routes. mu is held.
func (p *probes) addHandlers(routes caddyhttp.RouteList) {
	for _, route := range routes {
		for _, h := range route.Handlers {
			switch h := h.(type) {
			case *caddyhttp.Subroute:
				p.addHandlers(h.Routes)
			case *holdfast.WebSocketProxy:
				if !p.knows(h) {
					p.handler = append(p.handler, weak.Make(h))
				}
			}
		}
	}
}

func (p *probes) knows(h *holdfast.WebSocketProxy) bool {
	for _, w := range p.handler {
		if w.Value() == h {
			return true
		}
	}
	return false
}

func (p *probes) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.servers, p.tls, p.handler = nil, nil, nil
}

// perConfig is what one config has of these objects: two servers and its tls
// app seen by both. Its handlers have not been asked yet.
func (p *probes) perConfig() int { return 2 + 2 }

func (p *probes) alive() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return count(p.servers) + count(p.tls) + count(p.handler)
}

func (p *probes) describe() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Sprintf("%d of %d servers, %d of %d tls apps, %d of %d handlers", count(p.servers), len(p.servers),
		count(p.tls), len(p.tls), count(p.handler), len(p.handler))
}

func count[T any](ps []weak.Pointer[T]) (n int) {
	for _, p := range ps {
		if p.Value() != nil {
			n++
		}
	}
	return n
}
