package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
)

// This file tests what a client's request must be, what of it the backend sees,
// and what the client sees of the backend's answer.

// What a client may get wrong is refused before any backend is dialed, and what
// is no upgrade at all goes to the next handler.
func TestClientRefused(t *testing.T) {
	backend := newCountedBackend(t, echoRaw)
	p := startCaddy(t, "", "route {\n websocket_proxy "+backend.addr+" {\n name refusing\n}\n respond next\n}\nhandle_errors {\n respond \"custom {err.status_code}\"\n}")
	upgrade := func(line string, header ...string) string {
		return line + "\r\nHost: " + p.addr + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + strings.Join(header, "\r\n") + "\r\n\r\n"
	}
	const (
		get, v13, v8 = "GET / HTTP/1.1", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 8"
		key, badKey  = "Sec-WebSocket-Key: " + testKey, "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4P" // 15 bytes
		length       = "Content-Length: 5"
		chunked      = "Transfer-Encoding: chunked"
	)
	tests := []struct {
		name, request string
		status        int
		header, value string
	}{
		{"no key", upgrade(get, v13), 400, "", ""},
		{"short key", upgrade(get, v13, badKey), 400, "", ""},
		{"key that is not base64", upgrade(get, v13, "Sec-WebSocket-Key: !!!!!!!!!!!!!!!!!!!!!!=="), 400, "", ""},
		{"two keys", upgrade(get, v13, key, key), 400, "", ""},
		{"version 8", upgrade(get, v8, key), 426, "Sec-Websocket-Version", "13"},
		{"no version", upgrade(get, key), 426, "Sec-Websocket-Version", "13"},
		{"two versions", upgrade(get, v13, v8, key), 426, "Sec-Websocket-Version", "13"},
		{"version before key", upgrade(get, v8, badKey), 426, "Sec-Websocket-Version", "13"},
		{"POST", upgrade("POST / HTTP/1.1", v13, key), 405, "Allow", "GET"},
		{"PUT", upgrade("PUT / HTTP/1.1", v13, key), 405, "Allow", "GET"},
		{"POST before body, version and key", upgrade("POST / HTTP/1.1", v8, badKey, length) + "hello", 405, "Allow", "GET"},
		{"declared body", upgrade(get, v13, key, length) + "hello", 400, "", ""},
		{"chunked body", upgrade(get, v13, key, chunked) + "5\r\nhello\r\n0\r\n\r\n", 400, "", ""},
		{"body before version", upgrade(get, v8, key, length) + "hello", 400, "", ""},
		{"target that is no path", upgrade("GET x:chat HTTP/1.1", v13, key), 400, "", ""},
		{"ordinary GET", "GET / HTTP/1.1\r\nHost: " + p.addr + "\r\n\r\n", 200, "", ""},
		{"HTTP/1.0", upgrade("GET / HTTP/1.0", v13, key), 200, "", ""},
		{"no Connection", "GET / HTTP/1.1\r\nHost: " + p.addr + "\r\nUpgrade: websocket\r\n" + key + "\r\n" + v13 + "\r\n\r\n", 200, "", ""},
		{"another protocol", strings.Replace(upgrade(get, v13, key), "websocket", "h2c", 1), 200, "", ""},
	}
	refused := 0
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			res, _ := rawRequest(t, p.addr, tt.request)
			want := "next"
			if tt.status != http.StatusOK {
				want = fmt.Sprint("custom ", tt.status)
				refused++
			}
			if got := body(t, res); res.StatusCode != tt.status || got != want {
				t.Errorf("got %d %q, want %d %q", res.StatusCode, got, tt.status, want)
			}
			if got := res.Header.Get(tt.header); got != tt.value {
				t.Errorf("%s: got %q, want %q", tt.header, got, tt.value)
			}
			p.emptyWithin(t, soon)
		})
	}
	if got := backend.dials.Load(); got != 0 {
		t.Errorf("dials: got %d, want none", got)
	}
	if got := p.value(t, `caddy_connections_refused_total{kind="websocket",reason="handshake",route="refusing"}`); got != float64(refused) {
		t.Errorf("refused_total: got %v, want %d", got, refused)
	}
	t.Run("unusual but right", func(t *testing.T) {
		res, c := rawRequest(t, p.addr, "GET / HTTP/1.1\r\nHost: "+p.addr+"\r\nConnection: keep-alive, UPGRADE\r\nUpgrade: WebSocket\r\n"+key+"\r\n"+v13+"\r\n\r\n")
		if res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("status: got %d, want 101", res.StatusCode)
		}
		checkEcho(t, c)
	})
}

// A body that a client announces and then keeps, waiting for its answer, is
// refused without waiting for it.
func TestBodyThatDoesNotCome(t *testing.T) {
	p := startCaddy(t, "", "websocket_proxy "+freeAddr(t))
	for _, header := range []string{"Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"} {
		t.Run(header[:strings.Index(header, ":")], func(t *testing.T) {
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(15 * time.Second))
			_, _ = io.WriteString(conn, rawUpgrade(p.addr, header))
			answer := make([]byte, 12)
			_, err = io.ReadFull(conn, answer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("no answer, want 400")
			} else if string(answer) != "HTTP/1.1 400" {
				t.Errorf("got %q, %v; want 400", answer, err)
			}
		})
	}
}

// What the backend sees of the client's request.
func TestRequestHeaders(t *testing.T) {
	// The client says everything that it might say, and Host with another port.
	const host, request = "127.0.0.1:4242", "Host: 127.0.0.1:4242\r\nConnection: Upgrade, X-Hop\r\nConnection: X-Also-Hop\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + testKey + "\r\nSec-WebSocket-Protocol: chat, superchat\r\n" +
		"X-Hop: 1\r\nX-Also-Hop: 1\r\nKeep-Alive: timeout=5\r\nProxy-Authorization: Basic x\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\n" +
		"Holdfast-Connection: forged\r\nholdfast-other: forged\r\n" +
		"X-Forwarded-For: 192.0.2.1, 192.0.2.2\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: outer.example\r\n" +
		"Cookie: a=1; b=2\r\nAuthorization: Bearer x\r\nOrigin: https://example.com\r\nUser-Agent: test\r\nX-Twice: 1\r\nX-Twice: 2\r\n\r\n"
	always := http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Protocol": {"chat, superchat"},
		"X-Hop": nil, "X-Also-Hop": nil, "Keep-Alive": nil, "Proxy-Authorization": nil, "Proxy-Connection": nil, "Te": nil, "Holdfast-Other": nil,
		"Cookie": {"a=1; b=2"}, "Authorization": {"Bearer x"}, "Origin": {"https://example.com"}, "User-Agent": {"test"}, "X-Twice": {"1", "2"},
	}
	tests := []struct {
		name, globals, client string
		header                http.Header
	}{
		{"untrusted client", "", "127.0.0.1", http.Header{
			"X-Forwarded-For": {"127.0.0.1"}, "X-Forwarded-Proto": {"http"}, "X-Forwarded-Host": {host},
		}},
		{"trusted proxy", "servers {\n trusted_proxies static 127.0.0.1/32\n}", "192.0.2.1", http.Header{
			"X-Forwarded-For": {"192.0.2.1, 192.0.2.2, 127.0.0.1"}, "X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {"outer.example"},
		}},
		{"proxy that is not trusted", "servers {\n trusted_proxies static 192.0.2.0/24\n}", "127.0.0.1", http.Header{
			"X-Forwarded-For": {"127.0.0.1"}, "X-Forwarded-Proto": {"http"}, "X-Forwarded-Host": {host},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := startPairing(t, tt.globals, "")
			l := p.openBy(t, "GET /chat HTTP/1.1\r\n"+request)
			checkHeader(t, l.request.Header, always)
			checkHeader(t, l.request.Header, tt.header)
			if l.request.Host != host {
				t.Errorf("Host: got %q, want %q", l.request.Host, host)
			}
			c := p.only(t)
			if c.Client != tt.client {
				t.Errorf("client: got %s, want %s", c.Client, tt.client)
			}
			checkHeader(t, l.request.Header, http.Header{"Holdfast-Connection": {c.ID}})
			key := l.request.Header["Sec-Websocket-Key"]
			if len(key) != 1 || key[0] == testKey {
				t.Errorf("key: got %q, want one that is not the client's", key)
			}
			checkHeader(t, l.response.Header, http.Header{"Sec-Websocket-Accept": {handshake.AcceptKey(testKey)}})
		})
	}
}

// checkHeader compares the fields that want has; nil means that there is none.
func checkHeader(t testing.TB, got, want http.Header) {
	t.Helper()
	for name, values := range want {
		if !slices.Equal(got[name], values) {
			t.Errorf("%s: got %q, want %q", name, got[name], values)
		}
	}
}

// Path and query go to the backend as the client spelled them.
func TestRequestTarget(t *testing.T) {
	p := startPairing(t, "", "")
	for _, tt := range []struct{ target, want string }{
		{"/", "/"},
		{"/chat?x=1&x=2&y", "/chat?x=1&x=2&y"},
		{"/a%2Fb/%C3%A4//c;d?q=%20+&r=a;b", "/a%2Fb/%C3%A4//c;d?q=%20+&r=a;b"},
		{"//host/path", "//host/path"},
		{"/?", "/?"},
		{"/a/../b/./c", "/a/../b/./c"},
		{"http://" + p.addr + "/absolute?x", "/absolute?x"},
	} {
		t.Run(strings.ReplaceAll(tt.want, "/", "_"), func(t *testing.T) {
			l := p.openBy(t, strings.Replace(rawUpgrade(p.addr, ""), "/chat?x=1", tt.target, 1))
			if got := l.request.RequestURI; got != tt.want {
				t.Errorf("target: got %q, want %q", got, tt.want)
			}
		})
	}
}

// What the client sees of the backend's 101.
func TestResponseHeaders(t *testing.T) {
	p := startPairing(t, "", "")
	l := p.openBy(t, rawUpgrade(p.addr, "Sec-WebSocket-Protocol: chat, superchat\r\n"),
		"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Backend: yes\r\nSec-WebSocket-Protocol: superchat\r\n",
		"Keep-Alive: timeout=5\r\nConnection: X-Hop\r\nX-Hop: 1\r\nServer: backend\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n")
	checkHeader(t, l.response.Header, http.Header{
		"Set-Cookie": {"a=1", "b=2"}, "X-Backend": {"yes"}, "Sec-Websocket-Protocol": {"superchat"}, "Sec-Websocket-Extensions": nil,
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Accept": {handshake.AcceptKey(testKey)},
		"Keep-Alive": nil, "X-Hop": nil, "Server": {"backend"}, "Date": {"Thu, 01 Jan 1970 00:00:00 GMT"},
	})
	if c := p.only(t); c.Subprotocol != "superchat" {
		t.Errorf("subprotocol: got %q, want superchat", c.Subprotocol)
	}
}

// Bytes that share a packet with a handshake are a part of the stream.
func TestEarlyBytes(t *testing.T) {
	p := startPairing(t, "", "")
	// Less than what either side buffers of a handshake, and more.
	for _, size := range []int{1, 3000, 6000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			up, down := strings.Repeat("u", size), strings.Repeat("d", size)
			early := string(wireFrame(fin|text, up, true, 0)) + string(wireFrame(fin|pingOp, "early", true, 0))
			l := p.open(t, early, "\r\n", string(wireFrame(fin|text, down, false, 0)), string(wireFrame(fin|pingOp, "early", false, 0)))
			for _, end := range []struct {
				name string
				*rawConn
				want string
			}{{"backend", l.backend, up}, {"client", l.client, down}} {
				if h, got, err := end.receive(); err != nil || h.OpCode != ws.OpText || got != end.want {
					t.Errorf("%s: got %v of %d bytes, %v; want a text of %d", end.name, h.OpCode, len(got), err, size)
				}
				if h, got, err := end.receive(); err != nil || h.OpCode != ws.OpPing || got != "early" {
					t.Errorf("%s: got %v %q, %v; want a ping", end.name, h.OpCode, got, err)
				}
			}
		})
	}
}

// The server's timeouts are about requests: neither a backend that takes longer
// than the write timeout for its 101, nor a quiet connection meets them. With the
// access log on, Caddy flushes after the handler has returned.
func TestServerTimeouts(t *testing.T) {
	const timeouts = "servers {\n timeouts {\n %s\n}\n}"
	const site = "log {\n output discard\n}\nwebsocket_proxy "
	t.Run("write", func(t *testing.T) {
		backend := rawBackend(t, func(r *http.Request, c *rawConn) {
			pass(600 * time.Millisecond)
			echoRaw(r, c)
		})
		p := startCaddy(t, fmt.Sprintf(timeouts, "write 300ms"), site+backend)
		c := rawDial(t, p.addr, "")
		pass(200 * time.Millisecond) // until the server is through with the request
		checkEcho(t, c)
	})
	t.Run("read and idle", func(t *testing.T) {
		got := make(chan string, 1)
		backend := rawBackend(t, func(r *http.Request, c *rawConn) {
			_ = c.accept(r)
			pass(1500 * time.Millisecond) // nobody says anything
			_, _ = c.Write(frame.Append(nil, ws.OpText, []byte("still there?"), false))
			_, payload, _ := c.receive()
			got <- payload
		})
		p := startCaddy(t, fmt.Sprintf(timeouts, "read_header 1s\n read_body 1s\n write 1s\n idle 1s"), site+backend)
		c := rawDial(t, p.addr, "")
		if _, payload, err := c.receive(); err != nil || payload != "still there?" {
			t.Fatalf("got %q, %v", payload, err)
		}
		c.send(t, ws.OpText, "yes")
		if answer := <-got; answer != "yes" {
			t.Errorf("the backend got %q, want yes", answer)
		}
	})
}
