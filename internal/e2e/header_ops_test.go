// This file tests header_up, header_down and default_origin.

package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
)

// Every operation on a request's headers, as the backend sees it. UP is its address.
func TestHeaderUp(t *testing.T) {
	const sent = "X-A: a1\r\nX-A: a2\r\nX-B: b\r\nX-Secret-1: 1\r\nX-Secret-2: 2\r\nCookie: a=1; b=2\r\nX-Tenant: {http.request.host}\r\n"
	for _, tt := range []struct {
		name, settings string
		want           http.Header // nil: it is not there
	}{
		{"nothing", "", http.Header{"Host": {"127.0.0.1:4242"}, "X-A": {"a1", "a2"}, "Origin": nil}},
		{"set", "header_up X-A new\nheader_up X-C new", http.Header{"X-A": {"new"}, "X-C": {"new"}, "X-B": {"b"}}},
		{"add", "header_up +X-A a3\nheader_up +X-A a4\nheader_up +X-C c", http.Header{"X-A": {"a1", "a2", "a3", "a4"}, "X-C": {"c"}}},
		{"delete", "header_up -X-A\nheader_up -X-Nothing", http.Header{"X-A": nil, "X-B": {"b"}}},
		{"delete by a pattern", "header_up -X-Secret-*", http.Header{"X-Secret-1": nil, "X-Secret-2": nil, "X-A": {"a1", "a2"}}},
		{"replace", "header_up Cookie a=([0-9]) a=<$1>", http.Header{"Cookie": {"a=<1>; b=2"}}},
		{"replace all values", "header_up X-A a A", http.Header{"X-A": {"A1", "A2"}}},
		{
			"all at once, in the order of reverse_proxy", "header_up -X-A\nheader_up X-A ^(.*)$ <$1>\nheader_up X-A set\nheader_up +X-A added",
			http.Header{"X-A": nil},
		},
		{
			"placeholders", `header_up X-C "{remote_host} {http.request.header.X-B} {uri} {env.HOLDFAST_TEST} {nothing}"`,
			http.Header{"X-C": {"127.0.0.1 b /chat?x=1 set {nothing}"}},
		},
		{"a client's braces are its own", "header_up X-C {header.X-Tenant}", http.Header{"X-C": {"{http.request.host}"}, "X-Tenant": {"{http.request.host}"}}},
		{"and so with the upstream's", "header_up X-C \"{header.X-Tenant} {upstream_hostport}\"", http.Header{"X-C": {"{http.request.host} UP"}}},
		{"host of the upstream", "header_up Host {upstream_hostport}", http.Header{"Host": {"UP"}, "X-Forwarded-Host": {"127.0.0.1:4242"}}},
		{"host of one's own", "header_up Host other.test", http.Header{"Host": {"other.test"}}},
		{"host that is removed", "header_up -Host", http.Header{"Host": {"UP"}}},
		{"host that is removed, where others wait for the upstream", "header_up -Host\nheader_up X-C {upstream_hostport}", http.Header{"Host": {"UP"}, "X-C": {"UP"}}},
		{"parts of the upstream", "header_up X-C \"{http.reverse_proxy.upstream.address} {http.reverse_proxy.upstream.host}:{http.reverse_proxy.upstream.port}\"", http.Header{"X-C": {"tcp/UP UP"}}},
		{"forwarded", "header_up X-Forwarded-For 192.0.2.9\nheader_up -X-Forwarded-Proto", http.Header{"X-Forwarded-For": {"192.0.2.9"}, "X-Forwarded-Proto": nil}},
		{"origin", "default_origin https://page.test", http.Header{"Origin": {"https://page.test"}}},
		{"origin by a placeholder", "default_origin {scheme}://{host}", http.Header{"Origin": {"http://127.0.0.1"}}},
		{"origin that is changed", "default_origin https://page.test\nheader_up Origin ^https: http:", http.Header{"Origin": {"http://page.test"}}},
		{
			"the handshake's own cannot be changed",
			"header_up Upgrade h2c\nheader_up Connection close\nheader_up Sec-WebSocket-Key x\nheader_up -Sec-WebSocket-Version\nheader_up Sec-WebSocket-Extensions x\n" +
				"header_up Content-Length 5\nheader_up Transfer-Encoding chunked\nheader_up Trailer X-A\nheader_up Holdfast-Connection forged\nheader_up Holdfast-Resume forged",
			http.Header{
				"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Extensions": nil,
				"Content-Length": nil, "Transfer-Encoding": nil, "Trailer": nil, "Holdfast-Resume": nil,
			},
		},
		{"nor with the upstream's name", "header_up Upgrade {upstream_hostport}\nheader_up -Connection\nheader_up Holdfast-Connection {upstream_hostport}", http.Header{"Upgrade": {"websocket"}, "Connection": {"Upgrade"}}},
		{"a value breaks out of no line", "header_up X-C {query.evil}\nheader_up X-D fine", http.Header{"X-C": nil, "X-D": {"fine"}, "X-Evil": nil}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("HOLDFAST_TEST", "set")
			p := startPairing(t, "", tt.settings)
			request := rawUpgrade("127.0.0.1:4242", sent) // the client names another port
			if strings.Contains(tt.settings, "evil") {
				request = strings.Replace(request, "x=1", "evil=a%0d%0aX-Evil:+b", 1)
			}
			l := p.openBy(t, request)
			got := l.request.Header
			got["Host"] = []string{l.request.Host}
			for name, values := range tt.want {
				for i := range values {
					values[i] = strings.ReplaceAll(values[i], "UP", p.ln.Addr().String())
				}
				checkHeader(t, got, http.Header{name: values})
			}
			if c := p.only(t); l.request.Header.Get("Holdfast-Connection") != c.ID {
				t.Errorf("Holdfast-Connection: got %q, want %s", l.request.Header["Holdfast-Connection"], c.ID)
			}
			l.client.send(t, ws.OpText, "hello")
			l.backend.wantText(t, "hello")
		})
	}
}

// A client that says its origin keeps it.
func TestDefaultOrigin(t *testing.T) {
	p := startPairing(t, "", "default_origin https://page.test")
	for _, tt := range []struct {
		name, extra string
		want        []string
	}{
		{"none", "", []string{"https://page.test"}},
		{"its own", "Origin: https://client.test\r\n", []string{"https://client.test"}},
		{"null", "Origin: null\r\n", []string{"null"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := p.openBy(t, rawUpgrade(p.addr, tt.extra))
			checkHeader(t, l.request.Header, http.Header{"Origin": tt.want})
		})
	}
}

// Behind Caddy's TLS the backend learns of https.
func TestForwardedProto(t *testing.T) {
	w := startWitness(t)
	p := startCaddy(t, "", "websocket_proxy "+w.addr)
	addr, client := p.secure(t, "websocket_proxy "+w.addr)
	defer client.CloseIdleConnections()
	req, err := http.NewRequest(http.MethodGet, "https://"+addr+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": testKey,
		"X-Forwarded-Proto": "http", "X-Forwarded-Host": "forged.test",
	} {
		req.Header.Set(name, value)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status: got %d, want 101", res.StatusCode)
	}
	requests, _, _ := w.got()
	checkHeader(t, requests[0].Header, http.Header{"X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {addr}})
}

// At a re-dial what depends on the upstream is of the new one, and all else as it was
// when the client arrived.
func TestHeaderUpAtRedial(t *testing.T) {
	b := &change{first: func(c *rawConn) { c.Conn.Close() }}
	p := startChange(t, b, `header_up Host {upstream_hostport}
		header_up X-Up {upstream_hostport}
		header_up X-Both "{header.X-Name} at {upstream_hostport}"
		header_up X-Once {http.request.uuid}
		header_up -Cookie
		default_origin https://page.test`)
	c := rawDial(t, p.addr, "X-Name: {env.HOME}\r\nCookie: a=1\r\n")
	c.send(t, ws.OpText, "hello")
	c.wantText(t, "hello")
	first, second := b.asked(t), b.asked(t)
	now := p.connections(t)[0].Dial
	if second.Header.Get("Holdfast-Resume") == "" || second.Host != now || first.Host == second.Host {
		t.Errorf("hosts: got %s, and for Holdfast-Resume %q %s; want that of the first backend, and %s", first.Host, second.Header["Holdfast-Resume"], second.Host, now)
	}
	for _, r := range []*http.Request{first, second} {
		checkHeader(t, r.Header, http.Header{
			"X-Up": {r.Host}, "X-Both": {"{env.HOME} at " + r.Host}, "X-Once": first.Header["X-Once"], "Cookie": nil,
			"Origin": {"https://page.test"}, "X-Forwarded-Host": {p.addr},
		})
	}
	if first.Header.Get("X-Once") == "" {
		t.Error("X-Once: got nothing, want a UUID")
	}
	c.sendClose(t, 1000, "")
	c.hears(t, "client", says{1000, ""})
}

// Every operation on an answer's headers, as the client sees it, of a 101 and of a
// refusal. UP is the backend's address.
func TestHeaderDown(t *testing.T) {
	const answer = "Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2; Path=/\r\nX-A: a\r\nX-Secret: s\r\nServer: backend\r\n"
	for _, tt := range []struct {
		name, settings string
		want           http.Header
	}{
		{"nothing", "", http.Header{"X-A": {"a"}, "Set-Cookie": {"a=1; Path=/", "b=2; Path=/"}, "Server": {"backend"}}},
		{"set", "header_down X-A new\nheader_down X-B b", http.Header{"X-A": {"new"}, "X-B": {"b"}}},
		{"add", "header_down +Set-Cookie c=3", http.Header{"Set-Cookie": {"a=1; Path=/", "b=2; Path=/", "c=3"}}},
		{"delete", "header_down -X-Secret\nheader_down -Set-*", http.Header{"X-Secret": nil, "Set-Cookie": nil, "X-A": {"a"}}},
		{"replace", "header_down Set-Cookie Path=/ \"Path=/app; Secure\"", http.Header{"Set-Cookie": {"a=1; Path=/app; Secure", "b=2; Path=/app; Secure"}}},
		{"placeholders", "header_down X-B \"{upstream_hostport} {http.reverse_proxy.header.X-A} {uri}\"", http.Header{"X-B": {"UP a /chat?x=1"}}},
	} {
		for _, status := range []int{http.StatusSwitchingProtocols, http.StatusForbidden} {
			t.Run(fmt.Sprint(tt.name, " of ", status), func(t *testing.T) {
				backend := rawBackend(t, func(r *http.Request, c *rawConn) {
					if status == http.StatusForbidden {
						answers(response(status, "no", answer))(r, c)
					} else if c.accept(r, answer) == nil {
						echoFrames(c)
					}
				})
				p := startCaddy(t, "", "websocket_proxy "+backend+" {\n"+tt.settings+"\n}")
				res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
				if res.StatusCode != status {
					t.Fatalf("status: got %d, want %d", res.StatusCode, status)
				}
				for name, values := range tt.want {
					var want []string
					for _, v := range values {
						want = append(want, strings.ReplaceAll(v, "UP", backend))
					}
					checkHeader(t, res.Header, http.Header{name: want})
				}
				if status == http.StatusForbidden {
					if got := body(t, res); got != "no" {
						t.Errorf("body: got %q, want no", got)
					}
					return
				}
				checkEcho(t, c)
			})
		}
	}
}

// Whatever is done to an answer, it stays a handshake, or as long as it is.
func TestHeaderDownBreaksNothing(t *testing.T) {
	const settings = `
		header_down -Upgrade
		header_down -Connection
		header_down Sec-WebSocket-Accept forged
		header_down Sec-WebSocket-Protocol forged
		header_down Sec-WebSocket-Extensions permessage-deflate
		header_down Content-Length 1
		header_down Transfer-Encoding chunked`
	t.Run("101", func(t *testing.T) {
		p := startPairing(t, "", settings)
		l := p.openBy(t, rawUpgrade(p.addr, "Sec-WebSocket-Protocol: chat\r\n"), "Sec-WebSocket-Protocol: chat\r\n")
		checkHeader(t, l.response.Header, http.Header{
			"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Accept": {handshake.AcceptKey(testKey)},
			"Sec-Websocket-Protocol": {"chat"}, "Sec-Websocket-Extensions": nil, "Content-Length": nil, "Transfer-Encoding": nil,
		})
		l.client.send(t, ws.OpText, "up")
		l.backend.wantText(t, "up")
		l.backend.send(t, ws.OpText, "down")
		l.client.wantText(t, "down")
	})
	const chunked = "HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwho \r\n8\r\nare you?\r\n0\r\n\r\n"
	for name, answer := range map[string]string{"refusal": response(401, "who are you?"), "chunked refusal": chunked} {
		t.Run(name, func(t *testing.T) {
			p := startCaddy(t, "", "websocket_proxy "+rawBackend(t, answers(answer))+" {\n"+settings+"\n}")
			res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
			if got := body(t, res); res.StatusCode != 401 || got != "who are you?" {
				t.Errorf("got %d %q, want 401 as it was", res.StatusCode, got)
			}
		})
	}
}
