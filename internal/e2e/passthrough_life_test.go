// This file tests what becomes of tunnels: reloads, upstreams that go, inactivity.

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/caddyserver/caddy/v2"

	holdfast "github.com/holdfast-proxy/caddy-holdfast"
)

// passthroughProbe is the handler under another name, which remembers each one weakly.
type passthroughProbe struct{ holdfast.SNIPassthrough }

var passthroughs struct {
	mu  sync.Mutex
	all []weak.Pointer[passthroughProbe]
}

func init() { caddy.RegisterModule(new(passthroughProbe)) }

func (*passthroughProbe) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "layer4.handlers.sni_passthrough_probe", New: func() caddy.Module { return new(passthroughProbe) }}
}

func (p *passthroughProbe) Provision(ctx caddy.Context) error {
	passthroughs.mu.Lock()
	passthroughs.all = append(passthroughs.all, weak.Make(p))
	passthroughs.mu.Unlock()
	return p.SNIPassthrough.Provision(ctx)
}

// Reloads leave tunnels alone, and tunnels keep no old config in memory.
func TestPassthroughReload(t *testing.T) {
	const reloads = 5
	backend := echoBackend(t, nil)
	routes := func(grace int) string {
		return strings.ReplaceAll(toAll(fmt.Sprintf("%s {\n inactivity_grace %dm\n log\n}", backend, grace)), "sni_passthrough", "sni_passthrough_probe")
	}
	p, addr := startLayer4(t, "", routes(1))
	conns := []*net.TCPConn{dialTCP(t, addr)}
	wantEcho(t, conns[0], "hello")
	for i := range reloads {
		p.reload(t, p.layer4Config(addr, "", routes(i+2)))
		conns = append(conns, dialTCP(t, addr))
		for _, c := range conns {
			wantEcho(t, c, fmt.Sprint("after reload ", i))
		}
	}
	if got := p.stats(t).ByRoute; len(got) != 1 || got[addr+"#1"] != len(conns) {
		t.Errorf("routes: got %v, want all in one", got)
	}
	alive := 0
	if !eventually(20*time.Second, func() bool {
		runtime.GC()
		passthroughs.mu.Lock()
		defer passthroughs.mu.Unlock()
		alive = count(passthroughs.all)
		return alive == 1
	}) {
		t.Errorf("handlers in memory: got %d of %d, want that of the running config", alive, len(passthroughs.all))
	}
	for _, c := range conns {
		wantEcho(t, c, "still")
		c.Close()
	}
}

// Tunnels of an upstream that is gone from the config live for orphan_timeout, unless it
// comes back; those of a route that is gone likewise.
func TestPassthroughOrphans(t *testing.T) {
	one, two := echoBackend(t, nil), echoBackend(t, nil)
	const long, short = "connection_registry {\n orphan_timeout 1h\n}", "connection_registry {\n orphan_timeout 300ms\n}"
	route := func(to string) string { return toAll(to + " {\n name tunnels\n}") }
	p, addr := startLayer4(t, long, route(one))
	c := dialTCP(t, addr)
	wantEcho(t, c, "hello")
	before := p.stats(t).ClosedByReason["orphan"]
	for _, to := range []string{two, one} {
		p.reload(t, p.layer4Config(addr, long, route(to)))
		wantEcho(t, c, "on "+to)
	}
	// No plan is left of the time that the upstream was gone.
	p.reload(t, p.layer4Config(addr, short, route(one+" "+two)))
	wantEcho(t, c, "back")
	p.reload(t, p.layer4Config(addr, short, route(two)))
	wantEnd(t, c)
	p.waitReason(t, "orphan", before, 1)
	c = dialTCP(t, addr)
	wantEcho(t, c, "hello")
	p.reload(t, p.siteConfig(short, "respond ok"))
	wantEnd(t, c)
	p.waitReason(t, "orphan", before, 2)
}

// A drained upstream gets no new connection and keeps those that it has.
func TestPassthroughDrain(t *testing.T) {
	one, two := echoBackend(t, nil), echoBackend(t, nil)
	p, addr := startLayer4(t, "", toAll(one+" "+two+" {\n lb_policy first\n}"))
	c := dialTCP(t, addr)
	wantEcho(t, c, "hello")
	res, err := http.Post("http://"+p.admin+"/connections/drain", "application/json", strings.NewReader(`{"upstream":"`+one+`"}`))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if got := strings.TrimSpace(string(body)); res.StatusCode != http.StatusOK || got != `{"connections":0}` {
		t.Errorf("drain: got %d %s, want that none moves", res.StatusCode, got)
	}
	wantEcho(t, c, "still")
	next := dialTCP(t, addr)
	wantEcho(t, next, "hello")
	if got := p.stats(t).ByUpstream; got[one] != 1 || got[two] != 1 {
		t.Errorf("upstreams: got %v, want the new one at %s", got, two)
	}
	if status := p.call(t, http.MethodDelete, "/connections/drain?upstream="+url.QueryEscape(one), nil); status != http.StatusNoContent {
		t.Errorf("end of the drain: got status %d", status)
	}
	before := p.stats(t).ClosedByReason["admin"]
	if status := p.call(t, http.MethodPost, "/connections/"+p.connections(t)[0].ID+"/migrate", nil); status != http.StatusConflict {
		t.Errorf("migrate: got status %d, want 409", status)
	}
	for _, c := range p.connections(t) {
		if status := p.call(t, http.MethodDelete, "/connections/"+c.ID, nil); status != http.StatusNoContent {
			t.Errorf("DELETE: got status %d, want 204", status)
		}
	}
	wantEnd(t, c)
	wantEnd(t, next)
	p.waitReason(t, "admin", before, 2)
}

// Tunnels of an upstream that checks find unhealthy are closed if the config says so.
func TestPassthroughCloseIfUnhealthy(t *testing.T) {
	probed := tcpListener(t)
	_, port, _ := net.SplitHostPort(probed.Addr().String())
	backend := echoBackend(t, nil)
	p, addr := startLayer4(t, "connection_registry {\n orphan_timeout 0\n}",
		toAll(fmt.Sprintf("%s {\n health_tcp\n health_port %s\n health_interval 50ms\n close_if_unhealthy\n}", backend, port)))
	c := dialTCP(t, addr)
	wantEcho(t, c, "hello")
	before := p.stats(t).ClosedByReason["unhealthy"]
	probed.Close()
	wantEnd(t, c)
	p.waitReason(t, "unhealthy", before, 1)
}

// tcpListener accepts connections and closes them.
func tcpListener(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptTCP(ln, func(net.Conn) {}, done)
	return ln
}

// Inactivity is warned of once, and ends a standard tunnel; an immortal one lives on.
func TestPassthroughInactivity(t *testing.T) {
	backend := echoBackend(t, nil)
	const times = "\n inactivity_timeout 500ms\n inactivity_grace 100ms\n max_lifetime 1s\n}"
	p, addr := startLayer4(t, "", toAll(backend+" {\n keep_alive_treatment immortal"+times))
	immortal := dialTCP(t, addr)
	wantEcho(t, immortal, "hello")
	second := freeAddr(t)
	p.reload(t, p.layer4Config(addr+" {\n"+toAll(backend+" {\n keep_alive_treatment immortal"+times)+"}\n"+second, "metrics",
		toAll(backend+" {\n name idle\n keep_alive_treatment standard"+strings.Replace(times, " max_lifetime 1s\n", "", 1))))
	before := p.stats(t).ClosedByReason["idle"]
	idle := dialTCP(t, second)
	wantEcho(t, idle, "hello")
	wantEnd(t, idle)
	p.waitReason(t, "idle", before, 1)
	if got := p.value(t, `caddy_connections_idle_warnings_total{route="idle"}`); got != 1 {
		t.Errorf("warnings: got %v, want 1", got)
	}
	if !eventually(20*time.Second, func() bool { got := p.connections(t); return len(got) == 1 && got[0].Idle > 2 }) {
		t.Errorf("connections: got %+v, want the immortal one", p.connections(t))
	}
	wantEcho(t, immortal, "still")
	immortal.Close()
}
