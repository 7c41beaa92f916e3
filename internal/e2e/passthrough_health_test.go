// This file tests which upstreams get new tunnels, and keep those they have, as health
// checks say.

package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// door is a backend that can be shut and opened again, at one address.
type door struct {
	addr  string
	serve func(net.Conn)
	ln    net.Listener // nil: it is shut
	done  chan struct{}
}

func startDoor(t testing.TB, serve func(net.Conn)) *door {
	t.Helper()
	d := &door{addr: freeAddr(t), serve: serve}
	d.open(t)
	t.Cleanup(d.shut)
	return d
}

func (d *door) open(t testing.TB) {
	t.Helper()
	var err error
	if d.ln, err = net.Listen("tcp", d.addr); err != nil {
		t.Fatal(err)
	}
	d.done = make(chan struct{})
	go acceptTCP(d.ln, d.serve, d.done)
}

// shut refuses new connections; those that there are live on.
func (d *door) shut() {
	if d.ln != nil {
		d.ln.Close()
		<-d.done
		d.ln = nil
	}
}

func (d *door) port() string {
	_, port, _ := net.SplitHostPort(d.addr)
	return port
}

// viewIn returns an upstream as the API shows it in a route.
func (p *proxy) viewIn(t testing.TB, route, upstream string) upstreamView {
	t.Helper()
	all := p.views(t)
	i := slices.IndexFunc(all, func(v upstreamView) bool { return v.Route == route && v.Upstream == upstream })
	if i < 0 {
		t.Fatalf("upstreams: got %+v, want %s in %s among them", all, upstream, route)
	}
	return all[i]
}

func (p *proxy) waitHealthIn(t testing.TB, route, upstream string, healthy bool) {
	t.Helper()
	if !eventually(20*time.Second, func() bool { return p.viewIn(t, route, upstream).Healthy == healthy }) {
		t.Fatalf("upstream: got %+v, want that it is healthy: %t", p.viewIn(t, route, upstream), healthy)
	}
}

// tunnelsTo opens n tunnels, one after the other, and returns how many each upstream got.
func (p *proxy) tunnelsTo(t testing.TB, n int, dial func() net.Conn) map[string]int {
	t.Helper()
	known := make(map[string]bool)
	for _, c := range p.connections(t) {
		known[c.ID] = true
	}
	got := make(map[string]int)
	for range n {
		conn := dial()
		wantEcho(t, conn, "hello")
		for _, c := range p.connections(t) {
			if !known[c.ID] {
				known[c.ID] = true
				got[c.Upstream]++
			}
		}
		conn.Close()
	}
	return got
}

// A backend that accepts connections, but whose TLS is out of order, gets no new ones
// with health_tls, and keeps those that it has; health_tcp sees nothing wrong with it.
func TestPassthroughHealthTLS(t *testing.T) {
	a := testca.New(t)
	conf := &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "one.test", "one.test")}}
	choosy := conf.Clone()
	choosy.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if hello.ServerName != "one.test" {
			return nil, errors.New("that name is not served here")
		}
		return nil, nil
	}
	wrong := conf.Clone()
	wrong.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, errors.New("no name is served here") }
	over := func(conf *tls.Config) func(net.Conn) {
		return func(conn net.Conn) { echo(tls.Server(conn, conf)) }
	}
	well := over(choosy)
	var now atomic.Pointer[func(net.Conn)]
	now.Store(&well)
	sick := startDoor(t, func(conn net.Conn) { (*now.Load())(conn) })
	rock := echoBackend(t, choosy)

	const checks = "health_interval 100ms\n health_timeout 2s\n health_fails 2\n health_passes 2\n"
	addr := freeAddr(t)
	p := startCaddy(t, layer4Servers("metrics",
		layer4Server{addr, toSNI("one.test", fmt.Sprintf("%s %s {\n name secure\n lb_policy round_robin\n health_tls one.test\n %s}", sick.addr, rock, checks))},
		layer4Server{freeAddr(t), toAll(fmt.Sprintf("%s {\n name connects\n health_tcp\n %s}", sick.addr, checks))},
		layer4Server{freeAddr(t), toAll(fmt.Sprintf("%s {\n name nameless\n health_tls\n %s}", sick.addr, checks))},
	), "respond ok")
	dial := func() net.Conn { return dialSNI(t, addr, "one.test", a) }
	var live *tls.Conn // at the one that falls ill
	for live == nil {
		c := dialSNI(t, addr, "one.test", a)
		wantEcho(t, c, "hello")
		if p.viewIn(t, "secure", sick.addr).Connections == 1 {
			live = c
			break
		}
		c.Close()
	}
	p.waitHealthIn(t, "nameless", sick.addr, false) // it asks for no name, which this backend refuses
	wantVisits(t, "while all are healthy", p.tunnelsTo(t, 4, dial), map[string]int{sick.addr: 2, rock: 2})
	for _, illness := range []struct {
		name  string
		serve func(net.Conn)
	}{
		{"closes", func(net.Conn) {}},
		{"resets", func(conn net.Conn) {
			_, _ = conn.Read(make([]byte, 1)) // a reset any sooner may reach the peer's connect
			_ = conn.(*net.TCPConn).SetLinger(0)
		}},
		{"says nothing", func(conn net.Conn) { _, _ = io.Copy(io.Discard, struct{ io.Reader }{conn}) }},
		{"no TLS", func(conn net.Conn) { _, _ = io.WriteString(conn, "SSH-2.0-OpenSSH_9.6\r\n") }},
		{"wrong name", over(wrong)},
		{"no certificate", over(&tls.Config{})}, //nolint:gosec // it has nothing to protect
	} {
		t.Run(illness.name, func(t *testing.T) {
			now.Store(&illness.serve)
			p.waitHealthIn(t, "secure", sick.addr, false)
			wantVisits(t, "while one is ill", p.tunnelsTo(t, 3, dial), map[string]int{rock: 3})
			wantEcho(t, live, "still")
			if v := p.viewIn(t, "connects", sick.addr); !v.Healthy {
				t.Errorf("with health_tcp: got %+v, want it healthy", v)
			}
			series := fmt.Sprintf("caddy_connections_upstream_healthy{route=%q,upstream=%q}", "secure", sick.addr)
			if got := p.value(t, series); got != 0 {
				t.Errorf("%s: got %v, want 0", series, got)
			}
			now.Store(&well)
			p.waitHealthIn(t, "secure", sick.addr, true)
			wantVisits(t, "when both are healthy again", p.tunnelsTo(t, 4, dial), map[string]int{sick.addr: 2, rock: 2})
			if got := p.value(t, series); got != 1 {
				t.Errorf("%s: got %v, want 1", series, got)
			}
		})
	}
	live.Close()
}

// An upstream that refuses connections, on its port or on that of its checks, gets no new
// ones until it takes them again. One whose address placeholders make is not checked.
func TestPassthroughHealthTCP(t *testing.T) {
	rock := echoBackend(t, nil)
	t.Setenv("HOLDFAST_TEST_HOST", "127.0.0.1")
	named := strings.Replace(rock, "127.0.0.1", "tcp4/{env.HOLDFAST_TEST_HOST}", 1)
	backend, probed := startDoor(t, echo), startDoor(t, func(net.Conn) {})
	for name, tt := range map[string]struct {
		upstreams, settings string
		checked             *door
		want                string // where new ones go meanwhile
	}{
		"own port":    {backend.addr + " " + rock, "", backend, rock},
		"health_port": {backend.addr, "health_port " + probed.port(), probed, ""},
		"placeholder": {backend.addr + " " + named, "health_port " + probed.port(), probed, named},
	} {
		t.Run(name, func(t *testing.T) {
			p, addr := startLayer4(t, "", toAll(tt.upstreams+" {\n name tunnels\n lb_policy first\n health_tcp\n health_interval 100ms\n "+tt.settings+"\n}"))
			dial := func() net.Conn { return dialTCP(t, addr) }
			if !eventually(20*time.Second, func() bool { return p.viewIn(t, "tunnels", backend.addr).Healthy }) {
				t.Fatal("the upstream is not healthy")
			}
			live := dialTCP(t, addr)
			wantEcho(t, live, "hello")
			tt.checked.shut()
			p.waitHealthIn(t, "tunnels", backend.addr, false)
			if tt.want == "" {
				wantEnd(t, dial())
			} else {
				wantVisits(t, "while one is ill", p.tunnelsTo(t, 2, dial), map[string]int{tt.want: 2})
			}
			wantEcho(t, live, "still")
			if v := p.viewIn(t, "tunnels", backend.addr); v.Connections != 1 || v.Fails != 0 {
				t.Errorf("upstream: got %+v, want its live connection and no failures", v)
			}
			tt.checked.open(t)
			p.waitHealthIn(t, "tunnels", backend.addr, true)
			wantVisits(t, "when it is healthy again", p.tunnelsTo(t, 2, dial), map[string]int{backend.addr: 2})
			live.Close()
		})
	}
}

// An upstream that has refused max_fails connections gets no more for fail_duration after
// the first of them. A client that leaves while it is waited for is no failure.
func TestPassthroughPassiveChecks(t *testing.T) {
	const forgotten, maxFails = 1500 * time.Millisecond, 3
	sick, rock := startDoor(t, echo), echoBackend(t, nil)
	p, addr := startLayer4(t, "", toAll(fmt.Sprintf("%s %s {\n name tunnels\n lb_policy first\n fail_duration %v\n max_fails %d\n}", sick.addr, rock, forgotten, maxFails)))
	dial := func() net.Conn { return dialTCP(t, addr) }
	wantVisits(t, "while both are well", p.tunnelsTo(t, 2, dial), map[string]int{sick.addr: 2})
	sick.shut()
	began := time.Now()
	wantVisits(t, "while the first upstream fails", p.tunnelsTo(t, 6, dial), map[string]int{rock: 6})
	// On a machine that is too busy they may be forgotten meanwhile.
	if v, took := p.view(t, sick.addr), time.Since(began); took < forgotten && (v.Healthy || v.Fails != maxFails) {
		t.Errorf("upstream: got %+v, want it unhealthy with %d failures", v, maxFails)
	}
	sick.open(t)
	p.waitHealthIn(t, "tunnels", sick.addr, true)
	if early := forgotten - time.Since(began); early > 0 {
		t.Errorf("the failures were forgotten %v early", early)
	}
	wantVisits(t, "after fail_duration", p.tunnelsTo(t, 2, dial), map[string]int{sick.addr: 2})

	slow := fullBacklog(t)
	p.reload(t, p.layer4Config(addr, "", toAll(slow+" {\n name tunnels\n dial_timeout 1m\n fail_duration 1h\n}")))
	c := dialTCP(t, addr)
	_, _ = io.WriteString(c, "hello")
	if !eventually(10*time.Second, func() bool { return p.stats(t).ByState["connecting"] == 1 }) {
		t.Fatalf("states: got %v, want one that is connecting", p.stats(t).ByState)
	}
	c.Close()
	p.waitEmpty(t)
	if v := p.view(t, slow); v.Fails != 0 || !v.Healthy {
		t.Errorf("upstream: got %+v, want no failures", v)
	}
}

// With close_if_unhealthy the tunnels of an upstream that falls ill end one after the
// other over orphan_timeout; those that are left when it has recovered stay.
func TestPassthroughCloseIfUnhealthyIsPaced(t *testing.T) {
	const n = 40
	one, two := echoBackend(t, nil), echoBackend(t, nil)
	probed := startDoor(t, func(net.Conn) {})
	a, b := freeAddr(t), freeAddr(t)
	config := func(window time.Duration) string {
		return layer4Servers(fmt.Sprintf("connection_registry {\n orphan_timeout %v\n}", window),
			layer4Server{a, toAll(fmt.Sprintf("%s {\n name ill\n health_tcp\n health_port %s\n health_interval 50ms\n close_if_unhealthy\n}", one, probed.port()))},
			layer4Server{b, toAll(fmt.Sprintf("%s {\n name well\n health_tcp\n health_interval 50ms\n close_if_unhealthy\n}", two))})
	}
	const window, longer = time.Second, 5 * time.Second
	p := startCaddy(t, config(window), "respond ok")
	bystander := dialTCP(t, b)
	wantEcho(t, bystander, "hello")
	before := p.stats(t).ClosedByReason["unhealthy"]

	_, wantPaced := pacedConns(t, a, n)
	began := time.Now()
	probed.shut()
	wantPaced(began, window)
	p.waitReason(t, "unhealthy", before, n)
	wantEcho(t, bystander, "still")

	probed.open(t)
	p.waitHealthIn(t, "ill", one, true)
	p.reload(t, p.siteConfig(config(longer), "respond ok"))
	conns, _ := pacedConns(t, a, n)
	probed.shut()
	p.waitReason(t, "unhealthy", before, n+1)
	probed.open(t)
	p.waitHealthIn(t, "ill", one, true)
	recovered := time.Now()
	if !eventually(30*time.Second, func() bool { return time.Since(recovered) > longer+time.Second }) {
		t.Fatal("time stands still")
	}
	if got := p.viewIn(t, "ill", one).Connections; got == 0 || got == n {
		t.Errorf("connections when the upstream had recovered: got %d of %d, want some", got, n)
	}
	wantEcho(t, bystander, "still")
	bystander.Close()
	for _, c := range conns {
		c.Close()
	}
}
