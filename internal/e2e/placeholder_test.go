// This file tests placeholders in upstream addresses.

package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// Each client gets the upstream that its request makes of the placeholder, and after a
// loss the same again, also where the value was a variable, which is gone by then.
// API and metrics have the upstream's name with the placeholder in it, so that no
// client makes labels; where it was dialed is another field.
func TestPlaceholderUpstreams(t *testing.T) {
	posts := startPosts(t, 3)
	const globals, each = "metrics", " {\n name %s\n resume_interval 10ms 200ms\n}\n"
	site := fmt.Sprintf("@one query one=1\n vars @one who %s\n @two query two=1\n vars @two who %s\n", posts[0].addr, posts[1].addr)
	for _, route := range [][2]string{
		{"header", "{header.X-Backend}"},
		{"query", "ws://{query.b}"},
		{"vars", "{vars.who}"},
		{"mixed", "{header.X-Backend} " + posts[2].addr},
	} {
		site += fmt.Sprintf("websocket_proxy /%s %s"+each, route[0], route[1], route[0])
	}
	p := startCaddy(t, globals, site)
	for _, test := range []struct {
		route, upstream string
		clients         [2]visitor
	}{
		{"header", "{http.request.header.X-Backend}", [2]visitor{
			{target: "/header", header: "X-Backend: " + posts[0].addr + "\r\n"},
			{target: "/header", header: "X-Backend: " + posts[1].addr + "\r\n"},
		}},
		{"query", "ws://{http.request.uri.query.b}", [2]visitor{
			{target: "/query?b=" + posts[0].addr}, {target: "/query?b=" + posts[1].addr},
		}},
		{"vars", "{http.vars.who}", [2]visitor{{target: "/vars?one=1"}, {target: "/vars?two=1"}}},
	} {
		t.Run(test.route, func(t *testing.T) {
			clients := p.visit(t, 2, func(i int) visitor { return test.clients[i] })
			addrs := []string{posts[0].addr, posts[1].addr}
			slices.Sort(addrs)
			// want checks what is shown; resumes are those of the first client.
			want := func(when string, resumes int) {
				t.Helper()
				wanted := map[string]resumption{
					posts[0].addr: {State: "open", Upstream: test.upstream, Dial: posts[0].addr, Resumes: resumes},
					posts[1].addr: {State: "open", Upstream: test.upstream, Dial: posts[1].addr},
				}
				byDial := make(map[string]resumption)
				if !eventually(10*time.Second, func() bool { // they are told before they count as open
					clear(byDial)
					for _, c := range p.resumed(t) {
						c.ID, c.Replayed, c.Buffered = "", 0, 0
						byDial[c.Dial] = c
					}
					return maps.Equal(byDial, wanted)
				}) {
					t.Errorf("%s: got connections %+v, want %+v", when, byDial, wanted)
				}
				if shown := p.dialed(t, test.route, test.upstream); !slices.Equal(shown, append([]string{""}, addrs...)) {
					t.Errorf("%s: API shows the upstream %s at %q, want it as configured and at %q", when, test.upstream, shown, addrs)
				}
				if got := p.scrape(t); strings.Contains(got, posts[0].addr) || strings.Contains(got, posts[1].addr) {
					t.Errorf("%s: there are clients' addresses among the metrics' labels", when)
				}
				for i, v := range clients {
					if v.backend != posts[i].addr {
						t.Errorf("%s: client %d has %s, want its own %s", when, i, v.backend, posts[i].addr)
					}
				}
			}
			want("opened", 0)
			p.wantMetrics(t, map[string]string{
				fmt.Sprintf("caddy_connections_upstream_connections{route=%q,upstream=%q}", test.route, test.upstream): "2",
			})

			posts[0].leave()
			if !eventually(10*time.Second, func() bool { return p.stats(t).ByState["held"] == 1 }) {
				t.Errorf("connections: got %v, want one held", p.stats(t).ByState)
			}
			posts[0].come(t)
			clients.ask(t)
			want("resumed", 1)

			clients.leave()
			p.waitEmpty(t)
			var shown []string
			if !eventually(10*time.Second, func() bool {
				shown = p.dialed(t, test.route, test.upstream)
				return slices.Equal(shown, []string{""})
			}) {
				t.Errorf("API shows the upstream at %q, want it as configured: the rest goes with the last connection", shown)
			}
		})
	}

	// Beside others, the upstream of a placeholder is one of many.
	t.Run("mixed", func(t *testing.T) {
		own := visitor{target: "/mixed", header: "X-Backend: " + posts[0].addr + "\r\n"}
		all := p.visit(t, 40, func(int) visitor { return own })
		if got := all.by(posts); !slices.Equal(got, []int{20, 0, 20}) {
			t.Errorf("connections by upstream: got %v, want half of them on each of two", got)
		}
		posts[0].leave()
		all.ask(t)
		if got := all.by(posts); !slices.Equal(got, []int{0, 0, 40}) {
			t.Errorf("connections by upstream after a loss: got %v, want all on the other", got)
		}
		posts[0].come(t)
		all.leave()
		p.waitEmpty(t)
	})

	// A request that makes no address gets no upstream.
	t.Run("no address", func(t *testing.T) {
		for _, target := range []string{"/header", "/query?b=", "/query?b=host:1:2", "/query?b=unix//", "/vars"} {
			res, _ := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, ""), "/chat?x=1", target, 1))
			if res.StatusCode != http.StatusBadGateway {
				t.Errorf("%s: got status %d, want 502", target, res.StatusCode)
			}
		}
	})
}

// dialed returns at which addresses the admin API shows an upstream of a route, sorted.
func (p *proxy) dialed(t testing.TB, route, upstream string) (addrs []string) {
	t.Helper()
	var all []struct{ Route, Upstream, Dial string }
	p.call(t, http.MethodGet, "/connections/upstreams", &all)
	for _, u := range all {
		if u.Route == route && u.Upstream == upstream {
			addrs = append(addrs, u.Dial)
		}
	}
	slices.Sort(addrs)
	return addrs
}
