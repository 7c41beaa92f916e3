// This file tests whether live connections leave an upstream that has become unhealthy.

package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// With migrate_on_unhealthy 50 clients that do not pause leave an upstream whose probes
// fail, though it serves them, over the drain window. Nothing is lost. They stay when
// there is no other upstream, and go when there is.
func TestMigrateOnUnhealthy(t *testing.T) {
	const window = 2 * time.Second
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b", "-refuse", "503")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n drain_window %v\n migrate_on_unhealthy\n %s health_ws\n}",
		a.addr, b.addr, window, schedule(200*time.Millisecond, 10*time.Second, 1, 1)))
	p.waitHealth(t, slack, map[string]bool{a.addr: true, b.addr: false})
	all := startTalkers(t, p, 50)
	on := func(x *backendProcess) map[string]int { return map[string]int{x.addr: len(all)} }
	p.waitOn(t, slack, on(a))

	b.refuse(t, 0)
	p.waitHealth(t, slack, map[string]bool{a.addr: true, b.addr: true})
	p.waitOn(t, 0, on(a)) // another one that is healthy is no reason to leave
	a.refuse(t, 503)
	p.waitHealth(t, slack, map[string]bool{a.addr: false, b.addr: true})
	p.waitOn(t, window+slack, on(b))

	b.refuse(t, 503)
	p.waitHealth(t, slack, map[string]bool{a.addr: false, b.addr: false})
	pass(window)
	p.waitOn(t, 0, on(b))
	a.refuse(t, 0)
	p.waitHealth(t, slack, map[string]bool{a.addr: true, b.addr: false})
	p.waitOn(t, 5*time.Second+window+slack, on(a)) // they try again every 5s
	finishTalkers(t, all)
	wantWhole(t, all, 3, a, b)
}

// Without it they stay where they are.
func TestStayOnUnhealthy(t *testing.T) {
	a, b := startPatient(t), startPatient(t)
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy first\n drain_window 0s\n health_interval 200ms\n health_ws /health\n}", a.addr, b.addr))
	c := rawDial(t, p.addr, "")
	a.answer("/health", answers(response(503, "no")))
	p.waitHealth(t, slack, map[string]bool{a.addr: false, b.addr: true})
	pass(time.Second)
	if got := p.connections(t)[0]; got.Upstream != a.addr || got.State != "open" {
		t.Errorf("connection: got %s on %s, want that it stays on %s", got.State, got.Upstream, a.addr)
	}
	c.send(t, ws.OpText, "hello")
	c.wantText(t, "hello")
	// A reload that asks for it has them leave.
	p.reload(t, p.siteConfig("", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy first\n drain_window 0s\n health_interval 200ms\n health_ws /health\n migrate_on_unhealthy\n}", a.addr, b.addr)))
	p.waitOn(t, slack, map[string]int{b.addr: 1})
	// So does, then, a change of health, though the client says nothing.
	a.answer("/health", nil)
	p.waitHealth(t, slack, map[string]bool{a.addr: true, b.addr: true})
	pass(2 * time.Second) // until nothing else has it look around
	b.answer("/health", answers(response(503, "no")))
	p.waitOn(t, slack, map[string]int{a.addr: 1})
}

// Passive checks make them leave too: an upstream that failed too often is unhealthy.
func TestMigrateOnFailures(t *testing.T) {
	a, b := startPatient(t), startPatient(t)
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy first\n drain_window 0s\n fail_duration 1h\n max_fails 2\n migrate_on_unhealthy\n}", a.addr, b.addr))
	c := rawDial(t, p.addr, "")
	a.answer("/chat", answers(response(503, "busy")))
	for n := range 2 {
		p.waitOn(t, slack, map[string]int{a.addr: 1})
		if got := p.status(t); got != http.StatusSwitchingProtocols {
			t.Fatalf("client %d: got %d, want 101 of the other upstream", n, got)
		}
		if n == 0 {
			p.waitCount(t, 1)
		}
	}
	p.waitHealth(t, slack, map[string]bool{a.addr: false, b.addr: true})
	p.waitOn(t, slack, map[string]int{b.addr: 1})
	c.send(t, ws.OpText, "hello")
	c.wantText(t, "hello")
}
