// This file has further reloads follow one that moves connections: they lift its moves,
// fail, or free its config.

package e2e

import (
	"crypto/tls"
	"fmt"
	"maps"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
)

// A reload that brings an upstream back lifts the moves that are still planned. Those
// who have moved stay where they are.
func TestReloadBringsUpstreamBack(t *testing.T) {
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	site := func(window string, to ...*backendProcess) string {
		s := "websocket_proxy {\n drain_window " + window + "\n to"
		for _, to := range to {
			s += " " + to.addr
		}
		return s + "\n}"
	}
	const window = "6s"
	p := startCaddy(t, "", site(window, a))
	all := startTalkers(t, p, 40)
	p.reload(t, p.siteConfig("", site(window, b)))
	if !eventually(slack, func() bool { return p.stats(t).ByUpstream[b.addr] >= 10 }) {
		t.Errorf("nobody is moved: got %v", p.stats(t).ByUpstream)
	}
	p.reload(t, p.siteConfig("", site(window, a, b)))
	var before map[string]int
	if !eventually(slack, func() bool { // those under way arrive
		now := p.stats(t)
		before = now.ByUpstream
		return now.ByState["open"] == len(all)
	}) {
		t.Errorf("moves do not end: got %+v", p.stats(t))
	}
	pass(time.Second) // in which six or seven would move
	if after := p.stats(t).ByUpstream; !maps.Equal(before, after) || after[a.addr] < 5 || after[b.addr] < 10 {
		t.Errorf("connections: got %v after the upstream has come back, later %v; want the same, on both", before, after)
	}
	// The plan for those who go is a new one.
	p.reload(t, p.siteConfig("", site("0s", b)))
	p.waitOn(t, slack, map[string]int{b.addr: len(all)})
	finishTalkers(t, all)
	wantWhole(t, all, 2, a, b)
}

// A reload that fails, early or late, moves nobody, and nobody then either when
// another one keeps the upstreams.
func TestReloadThatFailsMovesNobody(t *testing.T) {
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	site := func(to *backendProcess) string {
		return fmt.Sprintf("websocket_proxy %s {\n name app\n drain_window 0s\n}", to.addr)
	}
	p := startCaddy(t, "", site(a))
	all := startTalkers(t, p, 10)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	// Apps are started in random order: this fails before and after the registry's.
	late := fmt.Sprintf("http://%s {\n bind 127.0.0.1\n respond taken\n}\n", taken.Addr())
	for n := range 6 {
		for name, config := range map[string]string{
			"no Caddyfile":   p.siteConfig("", site(b)) + "{",
			"no such value":  p.siteConfig("", strings.Replace(site(b), "drain_window 0s", "drain_window 0s\n replay none", 1)),
			"port is taken":  p.siteConfig("", site(b)) + late,
			"other route":    p.siteConfig("", strings.Replace(site(b), "app", "other", 1)) + late,
			"no such module": p.siteConfig("", site(b)+"\n no_such_directive"),
		} {
			if status, _ := p.submit(t, "text/caddyfile", []byte(config)); status == http.StatusOK {
				t.Fatalf("%s: the bad config was loaded", name)
			}
		}
		if n%3 == 2 {
			p.reload(t, p.siteConfig("", site(a)+fmt.Sprintf("\nheader X-Config %d", n)))
		}
	}
	pass(500 * time.Millisecond) // in which they would move
	p.waitOn(t, 0, map[string]int{a.addr: len(all)})
	if got := backendConns(t, b); len(got) > 0 {
		t.Errorf("connections to an upstream of a failed config: got %v", got)
	}
	finishTalkers(t, all)
	wantWhole(t, all, 1, a)
}

// Configs are freed although their connections have moved, or are yet to move, under
// the ones that followed: plain and over TLS, and with a policy of Caddy's own.
func TestMovesKeepNoConfigInMemory(t *testing.T) {
	const clients, reloads = 40, 8
	p := startCaddy(t, "", "respond ok") // the real config follows
	secure := freeAddr(t)
	_, securePort, _ := net.SplitHostPort(secure)
	backends := []string{rawBackend(t, echoRaw), rawBackend(t, echoRaw), rawBackend(t, echoRaw)}
	config := func(n int) string {
		site := fmt.Sprintf("config_probe\nheader X-Generation %d\nwebsocket_proxy %s %s {\n drain_window 100ms\n lb_policy round_robin\n}",
			n, backends[n%3], backends[(n+1)%3])
		return p.siteConfig("metrics\nskip_install_trust", "log {\n output discard\n}\n"+site) +
			fmt.Sprintf("https://localhost:%s {\n tls internal\n %s\n}\n", securePort, site)
	}
	// Caddy itself keeps the config under which it made its certificates.
	p.reload(t, config(0))
	insecure := &tls.Config{ServerName: "localhost", InsecureSkipVerify: true} //nolint:gosec // the CA was made a moment ago
	served := func() {
		t.Helper()
		if !eventually(20*time.Second, func() bool {
			conn, err := tls.Dial("tcp", secure, insecure)
			if err == nil {
				conn.Close()
			}
			return err == nil
		}) {
			t.Fatal("no TLS handshake succeeds")
		}
	}
	served() // a certificate is there
	configProbes.reset()
	p.reload(t, config(1))
	served() // what the old listener had accepted it may have reset
	var all []*resident
	for i := range clients {
		if i%2 == 0 {
			all = append(all, enterAt(t, p.addr, "/"))
		} else {
			all = append(all, enterSecure(t, secure, insecure))
		}
	}
	resumes := func() (n int) {
		for _, c := range p.resumed(t) {
			n += c.Resumes
		}
		return n
	}
	for n := range reloads {
		p.reload(t, config(n+2))
		// At least half of them have to move, so that some do under the next config.
		if !eventually(slack, func() bool { return resumes() >= (n+1)*clients/3 }) {
			t.Errorf("moves: got %d of %d connections after %d reloads, want more", resumes(), clients, n+1)
		}
	}
	up := map[int]bool{(reloads + 1) % 3: true, (reloads + 2) % 3: true}
	if !eventually(20*time.Second, func() bool {
		now, on := p.stats(t), 0
		for i := range up {
			on += now.ByUpstream[backends[i]]
		}
		return on == clients && now.ByState["open"] == clients
	}) {
		t.Errorf("connections: got %+v, want all on the latest upstreams", p.stats(t))
	}
	var alive int
	if !eventually(20*time.Second, func() bool { runtime.GC(); alive = configProbes.alive(); return alive <= configProbes.perConfig() }) {
		t.Errorf("objects of configs that are still in memory: got %d, want the %d of the running one: %s",
			alive, configProbes.perConfig(), configProbes.describe())
	}
	finish(t, all...)
}

// resumption is what the admin API shows of it.
type resumption struct {
	ID, State, Upstream, Dial string
	Resumes, Replayed         int
	Buffered                  int64 `json:"buffered_bytes"`
}

func (p *proxy) resumed(t testing.TB) []resumption {
	t.Helper()
	var list struct{ Connections []resumption }
	p.call(t, http.MethodGet, "/connections?limit=1000", &list)
	return list.Connections
}
