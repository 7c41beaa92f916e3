// This file runs the Caddyfile of docs/easegress.md.

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// The configuration of Easegress' tutorial does what it says, line by line.
func TestEasegressTutorial(t *testing.T) {
	servers, healthPort := startServers(t, 4)
	site := docSite(t)
	for i, port := range []string{"12345", "9095", "9096", "9097"} {
		site = replaceOnce(t, site, "127.0.0.1:"+port, servers[i].addr)
	}
	site = strings.ReplaceAll(site, "port          10080", "port          "+healthPort)
	addrs := make([]string, len(servers))
	for i, b := range servers {
		addrs[i] = "ws://" + b.addr
	}
	all := func(but string) map[string]bool {
		m := make(map[string]bool)
		for _, a := range addrs {
			m[a] = a != but
		}
		return m
	}
	p := startCaddy(t, "", site)
	reload := func(old, changed string) { p.reload(t, p.siteConfig("", replaceOnce(t, site, old, changed))) }
	visits := func(n int) map[string]int {
		t.Helper()
		got := make(map[string]int)
		for range n {
			c := p.dialWS(t, "Host: "+p.addr)
			got[p.connections(t)[0].Upstream]++
			c.sendClose(t, 1000, "")
			_, _, _, _ = c.receiveClose()
			p.waitEmpty(t)
		}
		return got
	}
	probed := func() {
		t.Helper()
		if !eventually(slack, func() bool {
			for _, b := range servers {
				if len(b.asked("/health/ws")) == 0 || len(b.asked("/health")) == 0 {
					return false
				}
			}
			return true
		}) {
			t.Error("not every server was probed in both ways")
		}
	}

	t.Run("pool", func(t *testing.T) {
		probed()
		p.waitHealth(t, slack, all(""))
		wantVisits(t, "of a round", visits(8), map[string]int{addrs[0]: 2, addrs[1]: 2, addrs[2]: 2, addrs[3]: 2})
		if res, _ := rawRequest(t, p.addr, upgradeTo("/elsewhere", "Host: "+p.addr)); res.StatusCode == http.StatusSwitchingProtocols {
			t.Error("another path than /ws gets a WebSocket")
		}
	})
	last := func() *http.Request {
		t.Helper()
		upstream := p.connections(t)[0].Upstream
		for i, b := range servers {
			if addrs[i] == upstream {
				asked := b.asked("/ws")
				return asked[len(asked)-1]
			}
		}
		t.Fatalf("no server has the connection: %s", upstream)
		return nil
	}
	leave := func(c *rawConn) {
		t.Helper()
		c.sendClose(t, 1000, "")
		_, _, _, _ = c.receiveClose()
		p.waitEmpty(t)
	}
	t.Run("headers", func(t *testing.T) {
		c := p.dialWS(t, "Host: 127.0.0.1:10020", "X-Own: 1")
		r := last()
		if r.Host != "127.0.0.1:10020" {
			t.Errorf("Host: got %q, want the client's", r.Host)
		}
		checkHeader(t, r.Header, http.Header{
			"Origin": {"http://127.0.0.1/hello"}, "X-Own": {"1"}, "X-Forwarded-For": {"127.0.0.1"},
			"X-Forwarded-Host": {"127.0.0.1:10020"}, "X-Forwarded-Proto": {"http"},
		})
		leave(c)
		c = p.dialWS(t, "Host: 127.0.0.1:10020", "Origin: https://a.test")
		checkHeader(t, last().Header, http.Header{"Origin": {"https://a.test"}})
		leave(c)
		reload("lb_policy", "header_up Host {upstream_hostport}\n lb_policy")
		c = p.dialWS(t, "Host: 127.0.0.1:10020")
		if r := last(); "ws://"+r.Host != p.connections(t)[0].Upstream {
			t.Errorf("Host with header_up: got %q, want the upstream's, %s", r.Host, p.connections(t)[0].Upstream)
		}
		leave(c)
	})
	t.Run("sizes", func(t *testing.T) {
		// A limit of the request's body does no harm.
		reload("websocket_proxy", "request_body {\n max_size 1KB\n }\n websocket_proxy")
		const limit = 32769
		c := p.dialWS(t, "Host: 127.0.0.1:10020")
		c.send(t, ws.OpBinary, strings.Repeat("x", limit))
		if _, got, err := c.receive(); err != nil || len(got) != limit {
			t.Fatalf("messages of the limit's size: got %d bytes, %v; want its echo", len(got), err)
		}
		c.send(t, ws.OpBinary, strings.Repeat("x", limit+1))
		if code, _, _, err := c.receiveClose(); err != nil || code != 1009 {
			t.Errorf("one byte more from the client: got close code %d, %v; want 1009", code, err)
		}
		c.Close()
		p.waitEmpty(t)
		c = p.dialWS(t, "Host: 127.0.0.1:10020")
		c.send(t, ws.OpText, "more")
		if code, _, _, err := c.receiveClose(); err != nil || code != 1009 {
			t.Errorf("one byte more from the server: got close code %d, %v; want 1009", code, err)
		}
		c.Close()
		p.waitEmpty(t)
	})
	t.Run("curl", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		p.reload(t, p.siteConfig("", site))
		args := docCurl(t)
		url := &args[len(args)-1]
		*url = strings.Replace(*url, "127.0.0.1:8080", p.addr, 1)
		answer := func() string {
			t.Helper()
			out := make(chan string, 1)
			go func() {
				text, _ := curl(ctx, t, "", args...)
				out <- text
			}()
			// curl writes the header when the connection ends.
			if !eventually(20*time.Second, func() bool { return p.stats(t).ByState["open"] == 1 }) {
				t.Error("curl has no connection")
			}
			p.call(t, http.MethodDelete, "/connections?state=open&window=0", nil)
			return <-out
		}
		if out := answer(); !strings.HasPrefix(out, "HTTP/1.1 101 ") {
			t.Errorf("the request of the docs: got %q, want 101", out)
		}
		p.waitEmpty(t)
		// As the tutorial prints it, with the path / and its placeholder of a key.
		reload("websocket_proxy /ws", "websocket_proxy")
		*url = strings.TrimSuffix(*url, "ws")
		if out := answer(); !strings.HasPrefix(out, "HTTP/1.1 101 ") {
			t.Errorf("the request of the tutorial: got %q, want 101", out)
		}
		p.waitEmpty(t)
	})
	t.Run("health", func(t *testing.T) {
		reload("health_interval 60s", "health_interval 150ms")
		sick, others := servers[1], map[string]int{addrs[0]: 1, addrs[2]: 1, addrs[3]: 1}
		page := func(status int, status1, maintenance, body string) script {
			return answers(response(status, body, "X-Status: "+status1+"\r\nX-Maintenance: "+maintenance+"\r\n"))
		}
		for _, tt := range []struct {
			name, path string
			answer     script
			healthy    bool
		}{
			{"ws status", "/health/ws", page(200, "healthy", "", ""), false},
			{"ws header", "/health/ws", sick.echo("X-Status: degraded\r\n"), false},
			{"http status", "/health", page(404, "healthy", "", "healthy"), false},
			{"http redirect", "/health", page(302, "healthy", "", "healthy"), true},
			{"http header by another value", "/health", page(200, "degraded", "", "healthy"), true},
			{"http header", "/health", page(200, "not healthy", "", "healthy"), false},
			{"http header that must be empty", "/health", page(200, "healthy", "now", "healthy"), false},
			{"http body", "/health", page(200, "healthy", "", "ill"), false},
		} {
			t.Run(tt.name, func(t *testing.T) {
				well := sick.answering(tt.path)
				sick.answer(tt.path, tt.answer)
				if tt.healthy {
					n := len(sick.asked(tt.path))
					if !eventually(slack, func() bool { return len(sick.asked(tt.path)) >= n+3 }) {
						t.Fatal("no probes come")
					}
					p.waitHealth(t, 0, all(""))
				} else {
					p.waitHealth(t, slack, all(addrs[1]))
					wantVisits(t, "of a round", visits(3), others)
				}
				sick.answer(tt.path, well)
				p.waitHealth(t, slack, all(""))
			})
		}
	})
}

// startServers starts backends that echo at loopback addresses of their own, and what
// answers their health checks, at one port of all.
func startServers(t testing.TB, n int) (servers []*patient, healthPort string) {
	t.Helper()
	listen := func(i int, port string) net.Listener {
		t.Helper()
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.%d:%s", i+2, port))
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	_, healthPort, _ = net.SplitHostPort(freeAddr(t))
	// What the page's headers say must have been sent.
	asIs := func(well script, header ...string) script {
		return func(r *http.Request, c *rawConn) {
			for i := 0; i < len(header); i += 2 {
				if r.Header.Get(header[i]) != header[i+1] {
					answers(response(403, "healthy", "X-Status: healthy\r\n"))(r, c)
					return
				}
			}
			well(r, c)
		}
	}
	for i := range n {
		b := newPatient()
		b.answer("/health/ws", asIs(b.echo("X-Status: healthy\r\n"), "X-Health-Check", "easegress"))
		b.answer("/health", asIs(answers(response(200, "it is healthy", "X-Status: healthy\r\n")),
			"X-Health-Check", "easegress", "Authorization", "Basic YWRtaW46eHh4eHh4"))
		b.answer("/ws", func(r *http.Request, c *rawConn) { b.echoOrMore(r, c) })
		b.listen(t, listen(i, healthPort))
		b.listen(t, listen(i, "0"))
		servers = append(servers, b)
	}
	return servers, healthPort
}

// echoOrMore is an echo, but for a text, for which a message comes that is too big.
func (b *patient) echoOrMore(r *http.Request, c *rawConn) {
	if c.accept(r) != nil {
		return
	}
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		switch h.OpCode {
		case ws.OpText:
			payload = strings.Repeat("x", 32770)
		case ws.OpPing:
			h.OpCode = ws.OpPong
		default:
		}
		_ = ws.WriteHeader(c, ws.Header{Fin: h.Fin, OpCode: h.OpCode, Length: int64(len(payload))})
		if _, err := io.WriteString(c, payload); err != nil || h.OpCode == ws.OpClose {
			return
		}
	}
}

// dialWS opens a WebSocket at /ws.
func (p *proxy) dialWS(t testing.TB, header ...string) *rawConn {
	t.Helper()
	res, c := rawRequest(t, p.addr, upgradeTo("/ws", header...))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status: got %d, want 101", res.StatusCode)
	}
	if !eventually(20*time.Second, func() bool { return p.stats(t).ByState["open"] == 1 }) {
		t.Fatalf("connections: got %+v, want one that is open", p.connections(t))
	}
	return c
}

// docSite returns what is in the site of the page's Caddyfile.
func docSite(t testing.TB) string {
	t.Helper()
	body, ok := strings.CutPrefix(docBlock(t, "caddyfile"), ":8080 {\n")
	if !ok || !strings.HasSuffix(body, "\n}\n") {
		t.Fatalf("the Caddyfile is not one site: %q", body)
	}
	return strings.TrimSuffix(body, "}\n")
}

// docCurl returns the arguments of the page's request.
func docCurl(t testing.TB) []string {
	t.Helper()
	text := strings.ReplaceAll(docBlock(t, "sh"), "\\\n", " ")
	text, ok := strings.CutPrefix(strings.TrimSpace(text), "curl ")
	if !ok {
		t.Fatalf("the page's request is not curl's: %q", text)
	}
	var args []string
	for i, part := range strings.Split(text, `"`) {
		if i%2 == 1 {
			args = append(args, part)
		} else {
			args = append(args, strings.Fields(part)...)
		}
	}
	return args
}

// docBlock returns the only block of a language in the page.
func docBlock(t testing.TB, language string) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/easegress.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(page), "```"+language+"\n")
	if len(blocks) != 2 {
		t.Fatalf("blocks of %s: got %d, want one", language, len(blocks)-1)
	}
	block, _, _ := strings.Cut(blocks[1], "```")
	return block
}

// replaceOnce replaces what is there exactly once.
func replaceOnce(t testing.TB, text, old, changed string) string {
	t.Helper()
	if n := strings.Count(text, old); n != 1 {
		t.Fatalf("%q is there %d times, want once", old, n)
	}
	return strings.Replace(text, old, changed, 1)
}
