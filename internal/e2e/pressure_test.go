// This file fills a Caddy up to max_connections, with connections of both kinds in every
// state, and looks which give way.

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// The limit of 20 is near at 18 and far again below 17.
func TestPressure(t *testing.T) {
	const halves = 4
	const near, far = "warn: max_connections is near, ending connections give way: 18", "info: max_connections is far again: 16"
	forgetNotices()
	old, dies := startWitness(t), startBackend(t, "coder", "dies")
	hold := make(chan struct{})
	holds := tcpBackend(t, func(conn net.Conn) {
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{conn})
		<-hold
	})
	addr := freeAddr(t)
	p := startCaddy(t, fmt.Sprintf(`%s
	connection_registry {
		max_connections 20
		pressure 90
	}
	layer4 {
		%s {
			%s
		}
	}`, keepsNotices, addr, toAll(holds)),
		fmt.Sprintf(`websocket_proxy %s
	websocket_proxy /flood %s
	websocket_proxy /held %s {
		resume_timeout 5m
		resume_interval 10ms 100ms
		replay unsent
	}
	websocket_proxy /move %s %s {
		name moving
		lb_policy first
		handshake_timeout 5m
		drain_window 0
	}`, rawBackend(t, echoRaw), rawBackend(t, floodRaw), dies.addr, old.addr, tcpBackend(t, func(conn net.Conn) { <-hold })))
	t.Cleanup(func() { close(hold) })
	before := p.stats(t).ClosedByReason
	rig := &pressed{proxy: p}

	rig.open(t, 5, "/open")
	flooded := rig.open(t, 2, "/flood")
	held := rig.open(t, 3, "/held?echo=1")
	rig.open(t, 2, "/move")
	var tunnels []*net.TCPConn
	for n := range halves + 2 {
		tunnels = append(tunnels, dialTCP(t, addr))
		p.waitCount(t, 13+n)
	}
	// The last to come is the first that is half open.
	half := slices.Clone(tunnels[:halves])
	slices.Reverse(half)
	for n, c := range half {
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		rig.want(t, map[string]int{"half_open": n + 1})
	}
	kill(t, dies)
	p.drain(t, old.addr, "moving")
	rig.want(t, map[string]int{"open": 9, "held": 3, "migrating": 2, "half_open": halves})
	wantNotices(t, "max_connections", near)

	// The ones that are closing, because their clients take nothing, go first.
	for _, c := range p.connections(t) {
		if strings.HasPrefix(c.URI, "/flood") {
			p.call(t, http.MethodDelete, "/connections/"+c.ID, nil)
		}
	}
	for range flooded {
		rig.open(t, 1, "/open")
		rig.want(t, map[string]int{"held": 3, "migrating": 2, "half_open": halves})
		rig.settle(t)
	}
	rig.want(t, map[string]int{"closing": 0, "held": 3, "migrating": 2, "half_open": halves})
	for n := p.stats(t).Total; n < 18; n++ { // should the machine be so slow that they ended by themselves
		rig.open(t, 1, "/open")
	}

	// Then those that are half open, the one that is so for longest first.
	for n, c := range half {
		rig.open(t, 1, "/open")
		wantFIN(t, c)
		rig.settle(t)
		rig.want(t, map[string]int{"open": 10 + n, "held": 3, "migrating": 2, "half_open": halves - 1 - n})
	}
	if got := p.stats(t).ClosedByReason["pressure"] - before["pressure"]; got != halves {
		t.Errorf("closed by pressure: got %d, want the %d that were half open", got, halves)
	}

	// There is nobody left but the living: at the limit new ones are refused.
	rig.open(t, 2, "/open")
	live := map[string]int{"open": 15, "held": 3, "migrating": 2, "half_open": 0, "closing": 0}
	rig.want(t, live)
	for range 3 {
		p.refusedWith(t, http.StatusServiceUnavailable, "")
		wantEnd(t, dialTCP(t, addr))
	}
	rig.want(t, live)

	// Held clients need no room to come back, and keep theirs when they are held again.
	for round := range 2 {
		dies.restart(t)
		rig.want(t, map[string]int{"open": 18, "held": 0, "migrating": 2})
		for i, c := range held {
			text := fmt.Sprint("message ", round, i)
			c.send(t, ws.OpText, text)
			c.wantText(t, text)
		}
		p.refusedWith(t, http.StatusServiceUnavailable, "")
		kill(t, dies)
		rig.want(t, live)
		p.refusedWith(t, http.StatusServiceUnavailable, "")
	}
	dies.restart(t)
	rig.want(t, map[string]int{"open": 18, "held": 0, "migrating": 2})
	for i, c := range rig.alive {
		text := fmt.Sprint("still ", i)
		c.send(t, ws.OpText, text)
		c.wantText(t, text)
	}

	rig.close(t, 3)
	wantNotices(t, "max_connections", near)
	rig.close(t, 1)
	wantNotices(t, "max_connections", near, far)
	rig.open(t, 1, "/open")
	wantNotices(t, "max_connections", near, far)
	rig.open(t, 1, "/open")
	wantNotices(t, "max_connections", near, far, near)
}

// pressed is a proxy that is filled up.
type pressed struct {
	*proxy
	alive []*rawConn // those whose backend echoes and lives
}

// open opens n WebSockets.
func (p *pressed) open(t testing.TB, n int, path string) (conns []*rawConn) {
	t.Helper()
	conns = p.openAt(t, n, path)
	if path == "/open" {
		p.alive = append(p.alive, conns...)
	}
	return conns
}

// close closes n of those that are alive.
func (p *pressed) close(t testing.TB, n int) {
	t.Helper()
	total := p.stats(t).Total
	for _, c := range p.alive[:n] {
		c.sendClose(t, 1000, "")
		if code, _, _, err := c.receiveClose(); err != nil || code != 1000 {
			t.Errorf("close: got %d, %v", code, err)
		}
	}
	p.alive = p.alive[n:]
	p.waitCount(t, total-n)
}

// settle waits until one that gave way is gone.
func (p *pressed) settle(t testing.TB) {
	t.Helper()
	var s stats
	if !eventually(20*time.Second, func() bool { s = p.stats(t); return s.Total <= 18 }) {
		t.Errorf("connections: got %+v, want that one gives way", s)
	}
}

// want waits until there are so many connections in these states.
func (p *pressed) want(t testing.TB, states map[string]int) {
	t.Helper()
	var got map[string]int
	if !eventually(20*time.Second, func() bool {
		got = p.stats(t).ByState
		for state, n := range states {
			if got[state] != n {
				return false
			}
		}
		return true
	}) {
		t.Fatalf("states: got %v, want %v", got, states)
	}
}

// A connection that has got old is told of, once.
func TestLongLived(t *testing.T) {
	forgetNotices()
	p := startCaddy(t, "metrics\n"+keepsNotices+"connection_registry {\n long_lived 300ms\n}", "websocket_proxy "+rawBackend(t, echoRaw))
	rawDial(t, p.addr, "")
	const old = "info: connection is long-lived: 0"
	wantNotices(t, "connection is long-lived", old)
	rawDial(t, p.addr, "")
	wantNotices(t, "connection is long-lived", old, old)
	swept := p.value(t, "caddy_connections_sweep_seconds_count")
	if !eventually(10*time.Second, func() bool { return p.value(t, "caddy_connections_sweep_seconds_count") > swept+2 }) {
		t.Error("the registry is not swept")
	}
	wantNotices(t, "connection is long-lived", old, old)
}
