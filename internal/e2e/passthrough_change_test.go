// This file tests what a reload that changes something does to live tunnels.

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// layer4Server is a layer4 server of a config.
type layer4Server struct{ addr, routes string }

// layer4Servers are global options with several layer4 servers.
func layer4Servers(globals string, servers ...layer4Server) string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s\nlayer4 {\n", globals)
	for _, s := range servers {
		fmt.Fprintf(&text, "%s {\n%s\n}\n", s.addr, s.routes)
	}
	return text.String() + "}"
}

// Each setting of a live tunnel counts from a reload on: shortened, it ends what is over;
// lengthened, it spares what would have been, also what had been warned.
func TestPassthroughChangedSettings(t *testing.T) {
	const limit, outlived = 8 * time.Second, 9 * time.Second
	echoes := echoBackend(t, nil)
	mute := tcpBackend(t, func(conn net.Conn) { _, _ = io.Copy(io.Discard, struct{ io.Reader }{conn}) })
	deaf := tcpBackend(t, func(conn net.Conn) { // which has nothing to say when its client has ended
		<-t.Context().Done()
	})
	const standard = "keep_alive_treatment standard\n"
	cases := []*struct {
		name, backend, before, after string
		want                         string // the reason; "": it lives on
		conn                         *net.TCPConn
		addr                         string
	}{
		{name: "shorter inactivity", backend: echoes, before: standard + "inactivity_timeout 1h\n inactivity_grace 0", after: standard + "inactivity_timeout 200ms\n inactivity_grace 0", want: "idle"},
		{name: "shorter grace", backend: echoes, before: standard + "inactivity_timeout 10ms\n inactivity_grace 1h", after: standard + "inactivity_timeout 10ms\n inactivity_grace 0", want: "idle"},
		{name: "no multiplier", backend: echoes, before: "inactivity_timeout 50ms\n inactivity_multiplier 1000000\n inactivity_grace 0", after: "inactivity_timeout 50ms\n inactivity_multiplier 1\n inactivity_grace 0", want: "idle"},
		{name: "no longer immortal", backend: echoes, before: "keep_alive_treatment immortal\n inactivity_timeout 50ms\n inactivity_grace 0", after: standard + "inactivity_timeout 50ms\n inactivity_grace 0", want: "idle"},
		{name: "shorter life", backend: echoes, before: "max_lifetime off", after: "max_lifetime 100ms", want: "lifetime"},
		{name: "shorter half", backend: deaf, before: "half_open_timeout 1h", after: "half_open_timeout 100ms", want: "half_open"},
		{name: "patience", backend: mute, before: "stuck_timeout off", after: "stuck_timeout 100ms", want: "stuck"},
		{name: "longer inactivity", backend: echoes, before: standard + fmt.Sprintf("inactivity_timeout %v\n inactivity_grace 0", limit), after: standard + "inactivity_timeout 1h\n inactivity_grace 0"},
		{name: "warned", backend: echoes, before: standard + fmt.Sprintf("inactivity_timeout 10ms\n inactivity_grace %v", limit), after: standard + fmt.Sprintf("inactivity_timeout 1h\n inactivity_grace %v", limit)},
		{name: "immortal", backend: echoes, before: standard + fmt.Sprintf("inactivity_timeout %v\n inactivity_grace 0\n max_lifetime %v", limit, limit), after: "keep_alive_treatment immortal"},
		{name: "longer life", backend: echoes, before: fmt.Sprintf("max_lifetime %v", limit), after: "max_lifetime off"},
	}
	config := func(after bool) string {
		var servers []layer4Server
		for _, c := range cases {
			settings := c.before
			if after {
				settings = c.after
			}
			servers = append(servers, layer4Server{c.addr, toAll(fmt.Sprintf("%s {\n name %q\n %s\n}", c.backend, c.name, settings))})
		}
		return layer4Servers("metrics", servers...)
	}
	for _, c := range cases {
		c.addr = freeAddr(t)
	}
	p := startCaddy(t, config(false), "respond ok")
	for _, c := range cases {
		c.conn = dialTCP(t, c.addr)
		switch c.backend {
		case echoes:
			wantEcho(t, c.conn, "hello")
		case mute:
			_, _ = io.WriteString(c.conn, "hello")
		case deaf:
			if !eventually(10*time.Second, func() bool {
				return slices.ContainsFunc(p.connections(t), func(now connection) bool { return now.Route == c.name && now.State == "open" })
			}) {
				t.Errorf("%s: the tunnel is not open", c.name)
			}
			_ = c.conn.CloseWrite() // not before: one that ends while a backend is dialed is gone
		}
	}
	if !eventually(10*time.Second, func() bool {
		s := p.stats(t)
		return s.ByState["open"] == len(cases)-1 && s.ByState["half_open"] == 1 && p.value(t, `caddy_connections_idle_warnings_total{route="warned"}`) == 1
	}) {
		t.Fatalf("states: got %v, want all open, one half, one warned", p.stats(t).ByState)
	}
	before := p.stats(t).ClosedByReason
	p.reload(t, p.siteConfig(config(true), "respond ok"))
	ends := make(map[string]int)
	for _, c := range cases {
		if c.want != "" {
			wantEnd(t, c.conn)
			c.conn.Close()
			ends[c.want]++
		}
	}
	for reason, n := range ends {
		p.waitReason(t, reason, before[reason], n)
	}
	if !eventually(30*time.Second, func() bool {
		all := p.connections(t)
		return len(all) > 0 && !slices.ContainsFunc(all, func(c connection) bool { return c.Idle < outlived.Seconds() })
	}) {
		t.Errorf("connections: got %+v, want all idle for long", p.connections(t))
	}
	for _, c := range cases {
		if c.want == "" {
			wantEcho(t, c.conn, "still")
		}
	}
	if got := p.value(t, `caddy_connections_idle_warnings_total{route="warned"}`); got != 1 {
		t.Errorf("warnings: got %v, want the one before the reload", got)
	}
	if after := p.stats(t).ClosedByReason; after["idle"]-before["idle"] != ends["idle"] || after["lifetime"]-before["lifetime"] != ends["lifetime"] {
		t.Errorf("closed: got %v after %v, want %v more", after, before, ends)
	}
	for _, c := range cases {
		c.conn.Close()
	}
}

// pacedConns opens n tunnels that have had an echo, and returns a function that waits for
// their ends and checks that these came paced over a window which began after the time
// given, and no sooner.
func pacedConns(t *testing.T, addr string, n int) (conns []*net.TCPConn, wantPaced func(began time.Time, window time.Duration)) {
	t.Helper()
	for range n {
		c := dialTCP(t, addr)
		wantEcho(t, c, "hello")
		conns = append(conns, c)
	}
	return conns, func(began time.Time, window time.Duration) {
		t.Helper()
		ended := make([]time.Duration, n)
		var all sync.WaitGroup
		for i, c := range conns {
			_ = c.SetDeadline(time.Now().Add(window + 30*time.Second))
			all.Go(func() {
				wantEnd(t, c)
				ended[i] = time.Since(began)
				c.Close()
			})
		}
		all.Wait()
		slices.Sort(ended)
		for i, took := range ended {
			if due := window * time.Duration(i+1) / time.Duration(n); took < due {
				t.Errorf("%d of %d were closed within %v, want that in %v at the soonest", i+1, n, took, due)
				return
			}
		}
		if last := ended[n-1]; last > window+15*time.Second {
			t.Errorf("the last one was closed after %v, want %v", last, window)
		}
	}
}

// Tunnels of an upstream that is gone, or of a route that is gone or has another name, end
// one after the other over orphan_timeout; those of others do not notice.
func TestPassthroughOrphansArePaced(t *testing.T) {
	const n, window = 20, time.Second
	one, two := echoBackend(t, nil), echoBackend(t, nil)
	a, b := freeAddr(t), freeAddr(t)
	config := func(first, second string) string {
		return layer4Servers(fmt.Sprintf("connection_registry {\n orphan_timeout %v\n}", window), layer4Server{a, first}, layer4Server{b, second})
	}
	route := func(name string, to ...string) string {
		return toAll(fmt.Sprintf("%s {\n name %s\n lb_policy first\n}", strings.Join(to, " "), name))
	}
	p := startCaddy(t, config(route("first", one, two), route("second", two)), "respond ok")
	bystander := dialTCP(t, b)
	wantEcho(t, bystander, "hello")
	before := p.stats(t).ClosedByReason["orphan"]

	_, wantPaced := pacedConns(t, a, n)
	began := time.Now()
	p.reload(t, p.siteConfig(config(route("first", two), route("second", two)), "respond ok"))
	kept, _ := pacedConns(t, a, 2) // at the other upstream, meanwhile
	wantPaced(began, window)
	p.waitReason(t, "orphan", before, n)
	wantEcho(t, bystander, "still")
	for _, c := range kept {
		wantEcho(t, c, "still")
		c.Close()
	}
	p.waitCount(t, 1)

	_, wantPaced = pacedConns(t, a, n)
	began = time.Now()
	p.reload(t, p.siteConfig(config(route("renamed", two), route("second", two)), "respond ok"))
	late, wantPacedToo := pacedConns(t, a, n)
	if got := p.stats(t).ByRoute["renamed"]; got != n {
		t.Errorf("route: got %d connections, want %d under its new name", got, n)
	}
	wantPaced(began, window)
	p.waitReason(t, "orphan", before, 2*n)
	for _, c := range late {
		wantEcho(t, c, "still")
	}
	began = time.Now()
	p.reload(t, p.siteConfig(layer4Servers(fmt.Sprintf("connection_registry {\n orphan_timeout %v\n}", window), layer4Server{b, route("second", two)}), "respond ok"))
	wantPacedToo(began, window)
	p.waitReason(t, "orphan", before, 3*n)
	wantEcho(t, bystander, "still")
	bystander.Close()
}

// An upstream that comes back while its tunnels are being closed keeps those that are left.
func TestPassthroughUpstreamBackInTime(t *testing.T) {
	const n, window = 50, 5 * time.Second
	one, two := echoBackend(t, nil), echoBackend(t, nil)
	globals := fmt.Sprintf("connection_registry {\n orphan_timeout %v\n}", window)
	route := func(to string) string { return toAll(to + " {\n name tunnels\n lb_policy first\n}") }
	p, addr := startLayer4(t, globals, route(one+" "+two))
	conns, _ := pacedConns(t, addr, n)
	before := p.stats(t).ClosedByReason["orphan"]
	began := time.Now()
	p.reload(t, p.layer4Config(addr, globals, route(two)))
	p.waitReason(t, "orphan", before, 1)
	p.reload(t, p.layer4Config(addr, globals, route(two+" "+one)))
	left := p.stats(t).ByState["open"]
	if left == 0 || left == n {
		t.Fatalf("connections when the upstream is back: got %d of %d, want some", left, n)
	}
	if !eventually(30*time.Second, func() bool { return time.Since(began) > window+time.Second }) {
		t.Fatal("time stands still")
	}
	if got := p.stats(t); got.ByState["open"] != left || got.ByUpstream[one] != left {
		t.Errorf("connections: got %+v, want the %d that were left", got, left)
	}
	echoed := 0
	for _, c := range conns {
		if _, err := io.WriteString(c, "still"); err == nil {
			if _, err := io.ReadFull(c, make([]byte, 5)); err == nil {
				echoed++
			}
		}
		c.Close()
	}
	if echoed != left {
		t.Errorf("live clients: got %d, want %d", echoed, left)
	}
}

// A server that moves to another port keeps the tunnels of routes with a name; those that
// are named after its address are other routes there.
func TestPassthroughServerMoves(t *testing.T) {
	backend := echoBackend(t, nil)
	const globals = "connection_registry {\n orphan_timeout 0\n}"
	for name, kept := range map[string]bool{"name tunnels": true, "": false} {
		t.Run(name, func(t *testing.T) {
			route := toAll(backend + " {\n " + name + "\n}")
			p, addr := startLayer4(t, globals, route)
			c := dialTCP(t, addr)
			wantEcho(t, c, "hello")
			before := p.stats(t).ClosedByReason["orphan"]
			other := freeAddr(t)
			p.reload(t, p.layer4Config(other, globals, route))
			next := dialTCP(t, other)
			wantEcho(t, next, "hello")
			if !eventually(10*time.Second, func() bool { return !reachable(addr) }) {
				t.Errorf("%s: got a connection, want that nobody listens there any more", addr)
			}
			if kept {
				wantEcho(t, c, "still")
				if got := p.stats(t).ByRoute; got["tunnels"] != 2 {
					t.Errorf("routes: got %v, want both in one", got)
				}
			} else {
				wantEnd(t, c)
				c.Close()
				p.waitReason(t, "orphan", before, 1)
			}
			wantEcho(t, next, "still")
			next.Close()
			c.Close()
		})
	}
}

// A drain goes on over a reload: the upstream gets nobody, and keeps whom it has.
func TestPassthroughDrainAndReload(t *testing.T) {
	one, two := echoBackend(t, nil), echoBackend(t, nil)
	route := func(grace string) string {
		return toAll(one + " " + two + " {\n name tunnels\n lb_policy first\n inactivity_grace " + grace + "\n}")
	}
	p, addr := startLayer4(t, "connection_registry {\n orphan_timeout 0\n}", route("1m"))
	c := dialTCP(t, addr)
	wantEcho(t, c, "hello")
	if status, body, err := p.post("/connections/drain", "application/json", []byte(`{"upstream":"`+one+`"}`)); status != http.StatusOK {
		t.Fatalf("drain: got %d %s, %v", status, body, err)
	}
	p.reload(t, p.layer4Config(addr, "connection_registry {\n orphan_timeout 0\n}", route("2m")))
	next := dialTCP(t, addr)
	wantEcho(t, next, "hello")
	wantEcho(t, c, "still")
	for upstream, draining := range map[string]bool{one: true, two: false} {
		if v := p.view(t, upstream); v.Draining != draining || v.Connections != 1 {
			t.Errorf("upstream: got %+v, want draining %t and one connection", v, draining)
		}
	}
	if status := p.call(t, http.MethodDelete, "/connections/drain?upstream="+one, nil); status != http.StatusNoContent {
		t.Errorf("end of the drain: got status %d", status)
	}
	next.Close()
	c.Close()
}

// A client for which an upstream is being dialed stays on the next one, when a reload takes
// away the first; it ends in time if its route is taken away, or the API says so.
func TestReloadWhileDialing(t *testing.T) {
	const globals = "connection_registry {\n orphan_timeout 3s\n}"
	full, backend, gone := fullBacklog(t), echoBackend(t, nil), echoBackend(t, nil)
	servers := map[string]*layer4Server{
		"stays":    {freeAddr(t), toAll(full + " " + backend + " {\n lb_policy first\n dial_timeout 2s\n}")},
		"upstream": {freeAddr(t), toAll(gone)},
		"route":    {freeAddr(t), toAll(full + " {\n name gone\n dial_timeout 10m\n}")},
		"api":      {freeAddr(t), toAll(full + " {\n name told\n dial_timeout 10m\n}")},
	}
	config := func() string {
		return layer4Servers(globals, *servers["stays"], *servers["upstream"], *servers["route"], *servers["api"])
	}
	p := startCaddy(t, config(), "respond ok")
	conns := make(map[string]*net.TCPConn)
	for name, s := range servers {
		conns[name] = dialTCP(t, s.addr)
		_, _ = io.WriteString(conns[name], "hello")
	}
	if !eventually(10*time.Second, func() bool { return len(p.connections(t)) == len(servers) }) {
		t.Fatalf("connections: got %+v, want %d", p.connections(t), len(servers))
	}
	if status := p.call(t, http.MethodDelete, "/connections?route=told&window=100ms", nil); status != http.StatusAccepted {
		t.Errorf("ending a route's connections: got %d, want 202", status)
	}
	servers["stays"].routes = toAll(backend + " {\n dial_timeout 2s\n}")
	servers["upstream"].routes = toAll(backend)
	servers["route"].routes = toAll(backend + " {\n name another\n}")
	p.reload(t, p.siteConfig(config(), "respond ok"))
	got := make([]byte, len("hello"))
	for _, name := range []string{"stays", "upstream"} {
		if _, err := io.ReadFull(conns[name], got); err != nil || string(got) != "hello" {
			t.Fatalf("%s: got %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"api", "route", "upstream"} {
		wantEnd(t, conns[name])
	}
	// What must not end it would have come by now, as it came for the others.
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
		wantEcho(t, conns["stays"], "still")
	}
}
