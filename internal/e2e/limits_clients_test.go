// This file tests who counts as one client, and what a reload of limits does.

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/gobwas/ws"
)

// Clients are told apart by the address that Caddy trusts: IPv4 the same however it is
// written, IPv6 by its prefix.
func TestWhoIsOneClient(t *testing.T) {
	const trusted = "servers {\n trusted_proxies static 127.0.0.0/8 ::1/128\n}\n"
	prefix := func(n string) string {
		return trusted + "connection_registry {\n max_connections_per_ip 1 " + n + "\n}"
	}
	const one = "max_connections_per_ip 1"
	for _, tt := range []struct {
		name, globals, route string
		first, same, others  []string // X-Forwarded-For
	}{
		{
			"route", trusted, one,
			[]string{"192.0.2.1", "2001:db8:1:1::1"},
			[]string{"192.0.2.1", "::ffff:192.0.2.1", "::ffff:c000:201", "192.0.2.1, 192.0.2.2", "2001:db8:1:1::2", "2001:db8:1:1:ffff:ffff:ffff:ffff"},
			[]string{"192.0.2.2", "::ffff:192.0.2.3", "2001:db8:1:2::1", "2001:db8:1:3::1", "::192.0.2.1"},
		},
		{
			"IPv4 in IPv6 first", trusted, one,
			[]string{"::ffff:192.0.2.1"},
			[]string{"192.0.2.1", "::ffff:192.0.2.1"},
			[]string{"::ffff:192.0.2.2", "192.0.2.3"},
		},
		{
			"registry", prefix(""), "",
			[]string{"192.0.2.1", "2001:db8:1:1::1"},
			[]string{"::ffff:192.0.2.1", "2001:db8:1:1::2"},
			[]string{"192.0.2.2", "2001:db8:1:2::1"},
		},
		{
			"prefix of the registry", prefix("48"), "",
			[]string{"2001:db8:1:1::1"},
			[]string{"2001:db8:1:2::1", "2001:db8:1:ffff::"},
			[]string{"2001:db8:2:1::1", "192.0.2.1", "192.0.2.2"},
		},
		{
			"prefix for a route's own limit", strings.Replace(prefix("128"), "_ip 1", "_ip 1000", 1), one,
			[]string{"2001:db8:1:1::1"},
			[]string{"2001:db8:1:1::1", "2001:db8:1:1:0::1"},
			[]string{"2001:db8:1:1::2", "2001:db8:1:1::3"},
		},
		{
			"nobody is trusted", "", one,
			[]string{"192.0.2.1"},
			[]string{"192.0.2.1", "192.0.2.2", "2001:db8::1"},
			nil,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			backend := newCountedBackend(t, echoRaw)
			p := startCaddy(t, tt.globals, "websocket_proxy "+backend.addr+" {\n "+tt.route+"\n}")
			for _, ip := range tt.first {
				rawDial(t, p.addr, "X-Forwarded-For: "+ip+"\r\n")
			}
			for _, ip := range tt.same {
				p.refusedWith(t, http.StatusTooManyRequests, "X-Forwarded-For: "+ip+"\r\n")
			}
			for _, ip := range tt.others {
				rawDial(t, p.addr, "X-Forwarded-For: "+ip+"\r\n")
			}
			if got, want := int(backend.dials.Load()), len(tt.first)+len(tt.others); got != want {
				t.Errorf("dials: got %d, want %d", got, want)
			}
			for _, c := range p.connections(t) {
				if ip := netip.MustParseAddr(c.Client); ip.Is4In6() {
					t.Errorf("client: got %s, want %s", ip, ip.Unmap())
				}
			}
		})
	}
}

// A peer's own address counts likewise: over IPv4 and IPv6, which arrive at one socket.
func TestPeersOverBothProtocols(t *testing.T) {
	p := startCaddy(t, "", "websocket_proxy "+rawBackend(t, echoRaw)+" {\n max_connections_per_ip 1\n}")
	_, port, _ := net.SplitHostPort(p.addr)
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, status := range []int{http.StatusSwitchingProtocols, http.StatusTooManyRequests} {
			res, c, err := ask("", net.JoinHostPort(host, port), rawUpgrade(p.addr, ""))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if res.StatusCode != status {
				t.Errorf("client of %s: got %d, want %d", host, res.StatusCode, status)
			}
		}
	}
}

// talkAll has every client's message echoed.
func talkAll(t testing.TB, all []*rawConn) {
	t.Helper()
	for i, c := range all {
		c.send(t, ws.OpText, fmt.Sprint("client ", i))
		c.wantText(t, fmt.Sprint("client ", i))
	}
}

// A reload that changes a limit ends nobody, and counts for the next client, with all
// who are there.
func TestReloadChangesLimits(t *testing.T) {
	const tooMany, unavailable = http.StatusTooManyRequests, http.StatusServiceUnavailable
	for _, tt := range []struct {
		name, globals, route string // %d is the limit
		status               int
	}{
		{"route", "", "max_connections %d", unavailable},
		{"registry", "connection_registry {\n max_connections %d\n}", "", unavailable},
		{"address at the route", "", "max_connections_per_ip %d", tooMany},
		{"address in the registry", "connection_registry {\n max_connections_per_ip %d\n}", "", tooMany},
		{"upstream", "", "upstream_max_connections %d", unavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			backend := newCountedBackend(t, echoRaw)
			limited := func(config string, limit int) string {
				if limit < 0 || config == "" {
					return ""
				}
				return fmt.Sprintf(config, limit)
			}
			site := func(limit int) (globals, body string) {
				return limited(tt.globals, limit), "websocket_proxy " + backend.addr + " {\n " + limited(tt.route, limit) + "\n}"
			}
			globals, body := site(3)
			p := startCaddy(t, globals, body)
			limit := func(n int) { p.reload(t, p.siteConfig(site(n))) } // below 0: unset
			var in []*rawConn
			fill := func(to int) {
				t.Helper()
				for len(in) < to {
					in = append(in, p.enter(t, ""))
				}
			}
			leave := func(to int) {
				t.Helper()
				for _, c := range in[to:] {
					c.reset()
				}
				in = in[:to]
				p.waitCount(t, to)
			}
			full := func() {
				t.Helper()
				for range 3 {
					p.refusedWith(t, tt.status, "")
				}
				talkAll(t, in)
			}
			fill(3)
			full()
			limit(5)
			fill(5)
			full()
			limit(2)
			full()
			leave(2)
			full()
			leave(1)
			fill(2)
			full()
			limit(-1)
			fill(7)
			limit(7)
			full()
			limit(0)
			fill(9)
			limit(4)
			full()
			leave(3)
			fill(4)
			full()
			if got := int(backend.dials.Load()); got != 3+2+1+5+2+1 {
				t.Errorf("dials: got %d, want %d", got, 3+2+1+5+2+1)
			}
		})
	}
}

// A route with 0 lifts the registry's limit for its connections, which do not count
// there; a reload that takes the 0 back counts them at once.
func TestRouteLiftsRegistrysLimit(t *testing.T) {
	for limit, status := range map[string]int{
		"max_connections":        http.StatusServiceUnavailable,
		"max_connections_per_ip": http.StatusTooManyRequests,
	} {
		t.Run(limit, func(t *testing.T) {
			backend := rawBackend(t, echoRaw)
			globals := "metrics\nconnection_registry {\n " + limit + " 3\n}"
			site := func(free string) string {
				return fmt.Sprintf("handle /free {\n websocket_proxy %[1]s {\n name free\n %[2]s\n}\n}\nhandle {\n websocket_proxy %[1]s {\n name bound\n}\n}", backend, free)
			}
			p := startCaddy(t, globals, site(limit+" 0"))
			var in []*rawConn
			enter := func(path string, n, status int) {
				t.Helper()
				for range n {
					res, c := p.asks(t, "", pathed(p.addr, path, ""))
					if res.StatusCode != status {
						t.Errorf("%s: got %d, want %d", path, res.StatusCode, status)
					} else if status == http.StatusSwitchingProtocols {
						in = append(in, c)
					}
				}
				talkAll(t, in)
			}
			enter("/free", 5, 101)
			enter("/bound", 3, 101)
			enter("/bound", 2, status)
			enter("/free", 2, 101)
			p.reload(t, p.siteConfig(globals, site("")))
			enter("/free", 1, status)
			enter("/bound", 1, status)
			p.reload(t, p.siteConfig(globals, site(limit+" 8")))
			enter("/free", 1, status) // the registry's holds too
			p.reload(t, p.siteConfig(globals, site(limit+" 0")))
			enter("/free", 2, 101)
			enter("/bound", 1, status)
			in[5].reset() // of the bound ones
			in = append(in[:5:5], in[6:]...)
			p.waitCount(t, len(in))
			enter("/bound", 1, 101)
			enter("/bound", 1, status)
			for route, want := range map[string]string{"free": "2", "bound": "5"} {
				p.wantMetrics(t, map[string]string{
					fmt.Sprintf(`caddy_connections_refused_total{kind="websocket",reason=%q,route=%q}`, limit, route): want,
				})
			}
		})
	}
}

// The address comes first where several limits are reached: 429 tells the client that
// it can do something about it.
func TestOrderOfLimits(t *testing.T) {
	p := startCaddy(t, "metrics\nservers {\n trusted_proxies static 127.0.0.1/32\n}",
		"websocket_proxy "+rawBackend(t, echoRaw)+" {\n name app\n max_connections 2\n max_connections_per_ip 1\n upstream_max_connections 2\n}")
	from := func(ip string) string { return "X-Forwarded-For: " + ip + "\r\n" }
	rawDial(t, p.addr, from("192.0.2.1"))
	p.refusedWith(t, http.StatusTooManyRequests, from("192.0.2.1"))
	rawDial(t, p.addr, from("192.0.2.2"))
	p.refusedWith(t, http.StatusTooManyRequests, from("192.0.2.1"))
	p.refusedWith(t, http.StatusTooManyRequests, from("192.0.2.2"))
	p.refusedWith(t, http.StatusServiceUnavailable, from("192.0.2.3"))
	p.wantMetrics(t, map[string]string{
		`caddy_connections_refused_total{kind="websocket",reason="max_connections_per_ip",route="app"}`: "3",
		`caddy_connections_refused_total{kind="websocket",reason="max_connections",route="app"}`:        "1",
	})
}
