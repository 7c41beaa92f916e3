// This file finds upstreams by DNS, while its answers change.

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/miekg/dns"
)

// A changed answer moves new connections at once. Those on an upstream that is not in
// it any more move within the drain window; nobody notices.
func TestDynamicAnswersChange(t *testing.T) {
	for _, test := range []struct {
		name    string
		source  func(n *nameserver, port string) string
		records [3]string // by which each backend is known
		shown   [3]string // and how it is called, without the port
	}{
		{
			name:    "a",
			source:  func(n *nameserver, port string) string { return n.source("a", "name a.test", "port "+port) },
			records: [3]string{"a.test. A 127.0.0.1", "a.test. A 127.0.0.2", "a.test. A 127.0.0.3"},
			shown:   [3]string{"127.0.0.1", "127.0.0.2", "127.0.0.3"},
		},
		{
			name: "srv",
			source: func(n *nameserver, _ string) string {
				return n.source("srv", "service ws", "proto tcp", "name srv.test")
			},
			records: [3]string{"_ws._tcp.srv.test. SRV 1 1 PORT b0.test.", "_ws._tcp.srv.test. SRV 2 1 PORT b1.test.", "_ws._tcp.srv.test. SRV 3 1 PORT b2.test."},
			shown:   [3]string{"b0.test.", "b1.test.", "b2.test."},
		},
		{
			name: "multi",
			source: func(n *nameserver, port string) string {
				return "multi {\n " + n.source("a", "name multi.test", "port "+port) + "\n " + n.source("srv multi.test") + "\n }"
			},
			records: [3]string{"multi.test. A 127.0.0.1", "multi.test. A 127.0.0.2", "multi.test. SRV 1 1 PORT b2.test."},
			shown:   [3]string{"127.0.0.1", "127.0.0.2", "b2.test."},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			addrs, port := sharedPort(t, "127.0.0.1", "127.0.0.2", "127.0.0.3")
			var backends []*backendProcess
			var shown []string
			for i, addr := range addrs {
				backends = append(backends, startBackendAt(t, addr, []string{"coder", "gorilla"}[i%2], fmt.Sprintf("b%d", i)))
				shown = append(shown, net.JoinHostPort(test.shown[i], port))
			}
			n := startNameserver(t)
			answer := func(records ...string) {
				t.Helper()
				records = append(slices.Clone(records), "b0.test. A 127.0.0.1", "b1.test. A 127.0.0.2", "b2.test. A 127.0.0.3")
				for i, record := range records {
					records[i] = strings.ReplaceAll(record, "PORT", port)
				}
				n.tell(t, dns.RcodeSuccess, records...)
			}
			answer(test.records[:2]...)
			p := startCaddy(t, "metrics", "websocket_proxy {\n name app\n drain_window 1s\n dynamic "+test.source(n, port)+"\n}")
			talkers := startTalkers(t, p, 12)
			var idle []*rawConn
			for range 4 {
				idle = append(idle, p.enter(t, ""))
			}
			if got := p.stats(t).ByUpstream; got[shown[0]] != 8 || got[shown[1]] != 8 {
				t.Fatalf("connections by upstream: got %v, want 8 each on %q", got, shown[:2])
			}

			answer(test.records[1:]...)
			changed := time.Now()
			if !eventually(20*time.Second, func() bool {
				rawDial(t, p.addr, "").Close()
				return p.stats(t).ByUpstream[shown[2]] > 0
			}) {
				t.Errorf("new connections do not come to %s", shown[2])
			}
			var on stats
			if !eventually(20*time.Second, func() bool {
				on = p.stats(t)
				return on.Total == 16 && on.ByState["open"] == 16 && on.ByUpstream[shown[0]] == 0
			}) {
				t.Fatalf("connections: got %v on %v, want none on %s", on.ByState, on.ByUpstream, shown[0])
			}
			t.Logf("all had moved after %v", time.Since(changed).Round(100*time.Millisecond))
			if !eventually(20*time.Second, func() bool { return slices.Equal(p.upstreams(t), shown[1:]) }) {
				t.Errorf("upstreams: got %q, want %q", p.upstreams(t), shown[1:])
			}
			p.wantMetrics(t, map[string]string{
				`caddy_connections_migrations_total{result="moved",route="app"}`:                  "8",
				`caddy_connections_upstream_healthy{route="app",upstream="` + shown[2] + `"}`:     "1",
				`caddy_connections_upstream_connections{route="app",upstream="` + shown[1] + `"}`: fmt.Sprint(on.ByUpstream[shown[1]]),
				`caddy_connections_active{kind="websocket",route="app",state="open"}`:             "16",
			})
			for _, c := range idle {
				c.send(t, ws.OpText, "still here")
				c.sendClose(t, 1000, "")
				if code, _, _, err := c.receiveClose(); err != nil || code != 1000 {
					t.Errorf("idle client: got close code %d, %v; want 1000", code, err)
				}
			}
			finishTalkers(t, talkers)
			wantWhole(t, talkers, 2, backends...)
		})
	}
}

// upstreams returns which upstreams the admin API shows, sorted.
func (p *proxy) upstreams(t testing.TB) (names []string) {
	t.Helper()
	var all []struct{ Upstream string }
	p.call(t, http.MethodGet, "/connections/upstreams", &all)
	for _, u := range all {
		names = append(names, u.Upstream)
	}
	slices.Sort(names)
	return names
}

// Answers that are none harm nobody: the last answer goes on being true for those who
// are there; new connections go to upstreams that the config has, or else to those of
// the last answer.
func TestDynamicWithoutAnswer(t *testing.T) {
	for _, test := range []struct{ name, source string }{
		{"a", "a {\n name fails-a.test\n %s\n }"},
		{"multi", "multi {\n a {\n name fails-multi.test\n %[1]s\n }\n srv {\n name fails-multi.test\n %[2]s\n }\n }"},
	} {
		t.Run(test.name, func(t *testing.T) {
			addrs, port := sharedPort(t, "127.0.0.1", "127.0.0.2", "127.0.0.3")
			var posts []*post
			for _, addr := range addrs {
				posts = append(posts, startPost(t, addr))
			}
			n := startNameserver(t)
			n.tell(t, dns.RcodeServerFailure)
			both := fmt.Sprintf("resolvers %s\n refresh 300ms", n.addr)
			source := strings.ReplaceAll(test.source, "%[2]s", both)
			source = strings.NewReplacer("%[1]s", "port "+port+"\n "+both, "%s", "port "+port+"\n "+both).Replace(source)
			const settings = "drain_window 0s\n resume_interval 10ms 200ms"
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy /alone {\n name alone\n dynamic %s\n %s\n}\n", source, settings)+
				fmt.Sprintf("websocket_proxy /both %s {\n name both\n dynamic %s\n %s\n}\n", addrs[2], source, settings))
			dial := func(target string) *visitor {
				t.Helper()
				return p.visit(t, 1, func(int) visitor { return visitor{target: target} })[0]
			}
			want := func(when string, v *visitor, backend string) {
				t.Helper()
				if v.backend != backend {
					t.Errorf("%s: got backend %s, want %s", when, v.backend, backend)
				}
			}

			n.heard(t)
			res, _ := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, ""), "/chat?x=1", "/alone", 1))
			if res.StatusCode != http.StatusServiceUnavailable {
				t.Errorf("no answer yet: got status %d, want 503", res.StatusCode)
			}
			fallback := dial("/both")
			want("no answer yet, an upstream in the config", fallback, addrs[2])

			record := fmt.Sprintf("fails-%s.test. A ", test.name)
			n.tell(t, dns.RcodeSuccess, record+"127.0.0.1", record+"127.0.0.2")
			n.heard(t)
			live := visitors{fallback}
			for range 4 {
				live = append(live, dial("/alone"), dial("/both"))
			}
			homes := make(map[*visitor]string)
			for _, v := range live {
				homes[v] = v.backend
			}
			for i, want := range []int{4, 4, 1} {
				if got := live.by(posts)[i]; got != want {
					t.Fatalf("connections by upstream: got %v, want 4, 4 and the one from before", live.by(posts))
				}
			}

			for _, none := range []struct {
				what   string
				status int
			}{{"SERVFAIL", dns.RcodeServerFailure}, {"no record", dns.RcodeSuccess}, {"NXDOMAIN", dns.RcodeNameError}} {
				n.tell(t, none.status)
				n.heard(t)
				for range 2 {
					v := dial("/alone")
					if v.backend != addrs[0] && v.backend != addrs[1] {
						t.Errorf("%s: got backend %s, want one of the last answer", none.what, v.backend)
					}
					v.conn.Close()
				}
				want(none.what+", an upstream in the config", dial("/both"), addrs[2])
				live.ask(t)
				for v, home := range homes {
					want(none.what+", a live connection", v, home)
				}
			}
			for _, c := range p.resumed(t) {
				if c.Resumes != 0 {
					t.Errorf("connection: got %+v, want that it stayed where it was", c)
				}
			}

			// Who loses its backend goes to another one of the last answer.
			posts[0].leave()
			for _, v := range live {
				if v.backend == addrs[0] {
					if err := v.ask(); err != nil {
						t.Fatal(err)
					}
					if v.backend == addrs[0] || v.target == "/alone" && v.backend != addrs[1] {
						t.Errorf("after a loss: got %s, want another one that is known", v.backend)
					}
				}
			}
		})
	}
}

// A reload does not move connections: the new config does not know yet which
// upstreams there are.
func TestDynamicReload(t *testing.T) {
	addrs, port := sharedPort(t, "127.0.0.1", "127.0.0.2")
	backend := startPost(t, addrs[0])
	startPost(t, addrs[1])
	n := startNameserver(t)
	n.tell(t, dns.RcodeSuccess, "reloads.test. A 127.0.0.1")
	site := func(more string) string {
		return "websocket_proxy " + more + " {\n name app\n drain_window 0s\n dynamic " + n.source("a", "name reloads.test", "port "+port) + "\n}"
	}
	p := startCaddy(t, "", site(""))
	v := p.visit(t, 1, func(int) visitor { return visitor{target: "/"} })[0]
	for _, status := range []int{dns.RcodeServerFailure, dns.RcodeSuccess} {
		for _, more := range []string{"", addrs[1]} {
			n.tell(t, status, "reloads.test. A 127.0.0.1")
			p.reload(t, p.siteConfig("", site(more)+"\n# "+fmt.Sprint(status)))
			n.heard(t)
			if err := v.ask(); err != nil || v.backend != backend.addr {
				t.Fatalf("after a reload with %q, DNS status %d: got backend %s, %v; want the same", more, status, v.backend, err)
			}
		}
	}
	if got := p.resumed(t)[0].Resumes; got != 0 {
		t.Errorf("resumes: got %d, want 0", got)
	}
	v.conn.send(t, ws.OpClose, "")
}

// Upstreams that come keep the connections that they get, also those that were opened
// before anybody but their clients has asked for the new answer.
func TestDynamicUpstreamsCome(t *testing.T) {
	hosts := []string{"127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}
	addrs, port := sharedPort(t, hosts...)
	var records []string
	for i, addr := range addrs {
		startPost(t, addr)
		records = append(records, "comes.test. A "+hosts[i])
	}
	n := startNameserver(t)
	n.tell(t, dns.RcodeSuccess, records[0])
	p := startCaddy(t, "", "websocket_proxy {\n name app\n drain_window 0s\n dynamic "+n.source("a", "name comes.test", "port "+port)+"\n}")
	plain := func(int) visitor { return visitor{target: "/"} }
	p.visit(t, 1, plain)
	for i := 1; i < len(records); i++ {
		n.heard(t) // the pool has the answer before
		n.tell(t, dns.RcodeSuccess, records[:i+1]...)
		if !eventually(20*time.Second, func() bool { return p.visit(t, 1, plain)[0].backend == addrs[i] }) {
			t.Fatalf("new connections do not come to %s", addrs[i])
		}
	}
	n.heard(t)
	pass(2 * time.Second) // in which they would move
	for _, c := range p.resumed(t) {
		if c.Resumes != 0 {
			t.Errorf("connection: got %+v, want that it stayed where it was", c)
		}
	}
}

// A source may answer by the request: its clients stay where that sent them.
func TestDynamicAnswersByRequest(t *testing.T) {
	addrs, port := sharedPort(t, "127.0.0.1", "127.0.0.2", "127.0.0.3")
	for _, addr := range addrs {
		startPost(t, addr)
	}
	n := startNameserver(t)
	n.tell(t, dns.RcodeSuccess, "tenant.test. A 127.0.0.1", "a-tenant.test. A 127.0.0.2", "b-tenant.test. A 127.0.0.3")
	p := startCaddy(t, "", "websocket_proxy {\n name app\n drain_window 0s\n dynamic "+n.source("a", "name {query.of}tenant.test", "port "+port)+"\n}")
	n.heard(t)
	all := p.visit(t, 20, func(i int) visitor { return visitor{target: "/?of=" + []string{"a-", "b-"}[i%2]} })
	pass(2 * time.Second) // in which they would move
	all.ask(t)
	for i, v := range all {
		if want := addrs[1+i%2]; v.backend != want {
			t.Errorf("client %d: got backend %s, want %s", i, v.backend, want)
		}
	}
	for _, c := range p.resumed(t) {
		if c.Resumes != 0 {
			t.Errorf("connection: got %+v, want that it stayed where it was", c)
		}
	}
}
