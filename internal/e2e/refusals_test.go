package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
)

// This file tests what a client gets that gets no WebSocket, and whom it may
// get one from instead.

// script is what a backend does with one connection.
type script = func(r *http.Request, c *rawConn)

// answers is a backend that answers every handshake with the same bytes.
func answers(text string) script {
	return func(_ *http.Request, c *rawConn) { _, _ = io.WriteString(c, text) }
}

// response is a whole response with a body.
func response(status int, body string, header ...string) string {
	return fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Length: %d\r\n%s\r\n%s",
		status, http.StatusText(status), len(body), strings.Join(header, ""), body)
}

// silent reads and never answers.
func silent(_ *http.Request, c *rawConn) { _, _ = io.Copy(io.Discard, c) }

// resets breaks the connection instead of answering.
func resets(_ *http.Request, c *rawConn) { _ = c.Conn.(*net.TCPConn).SetLinger(0) }

// wrongAccept answers with the accept of another key.
var wrongAccept = answers("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Accept: " + handshake.AcceptKey(testKey) + "\r\n\r\n")

// accepts is a 101 that has the right accept and the given lines instead of the
// upgrade's own.
func accepts(lines string) script {
	return func(r *http.Request, c *rawConn) {
		_, _ = fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: %s\r\n%s\r\n",
			handshake.AcceptKey(r.Header.Get("Sec-WebSocket-Key")), lines)
	}
}

// countedBackend is a rawBackend that counts how often it is dialed.
type countedBackend struct {
	net.Listener
	addr  string
	dials atomic.Int32
}

func (b *countedBackend) Accept() (net.Conn, error) {
	conn, err := b.Listener.Accept()
	if err == nil {
		b.dials.Add(1)
	}
	return conn, err
}

func newCountedBackend(t testing.TB, serve script) *countedBackend {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &countedBackend{Listener: ln, addr: ln.Addr().String()}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptRaw(b, serve, done)
	return b
}

// emptyWithin checks that the registry is soon empty, on a machine that is not busy.
func (p *proxy) emptyWithin(t testing.TB, limit time.Duration) {
	t.Helper()
	if !eventually(limit+slack, func() bool { return p.stats(t).Total == 0 }) {
		t.Errorf("connections left after %s: %+v", limit, p.connections(t))
	}
}

// body reads a response to its end.
func body(t testing.TB, res *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Errorf("reading body: %v", err)
	}
	return string(b)
}

// checkEcho sends a message and a close frame to a backend that echoes both.
func checkEcho(t testing.TB, c *rawConn) {
	t.Helper()
	c.send(t, ws.OpText, "hello")
	if h, payload, err := c.receive(); err != nil || h.OpCode != ws.OpText || payload != "hello" {
		t.Fatalf("echo: got %v %q, %v", h.OpCode, payload, err)
	}
	c.sendClose(t, 1000, "")
	if code, _, _, err := c.receiveClose(); err != nil || code != 1000 {
		t.Errorf("close: got %d, %v; want the echo of 1000", code, err)
	}
}

// What a backend answers instead of a true 101.
func TestBackendRefuses(t *testing.T) {
	tests := []struct {
		name   string
		serve  script
		status int
		body   string
		header http.Header // what the client must see of it
	}{
		{
			"401 with a body", answers(response(401, "who are you?", "WWW-Authenticate: Basic realm=\"a\"\r\nWWW-Authenticate: Bearer\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n")),
			401, "who are you?",
			http.Header{"Www-Authenticate": {`Basic realm="a"`, "Bearer"}, "Set-Cookie": {"a=1", "b=2"}, "Content-Length": {"12"}},
		},
		{"chunked 401", answers("HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwho \r\n3\r\nare\r\n0\r\n\r\n"), 401, "who are", nil},
		{"401 to the end of the connection", answers("HTTP/1.0 401 Unauthorized\r\nConnection: close\r\nKeep-Alive: timeout=5\r\n\r\nwho?"), 401, "who?", http.Header{"Keep-Alive": nil}},
		{"403", answers(response(403, "no", "X-Why: because\r\n")), 403, "no", http.Header{"X-Why": {"because"}}},
		{"404", answers(response(404, "")), 404, "", nil},
		{"426", answers(response(426, "", "Sec-WebSocket-Version: 8\r\n")), 426, "", http.Header{"Sec-Websocket-Version": {"8"}}},
		{"429", answers(response(429, "", "Retry-After: 7\r\n")), 429, "", http.Header{"Retry-After": {"7"}}},
		{"500", answers(response(500, "oops")), 500, "oops", nil},
		{"302", answers(response(302, "", "Location: http://127.0.0.1:1/x\r\n")), 302, "", http.Header{"Location": {"http://127.0.0.1:1/x"}}},
		{"200", answers(response(200, "a page", "Content-Type: text/plain\r\n")), 200, "a page", http.Header{"Content-Type": {"text/plain"}}},
		{"204", answers("HTTP/1.1 204 No Content\r\n\r\n"), 204, "", nil},
		{"103 before 401", answers("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + response(401, "no")), 401, "no", nil},
		{"502 of the only one", answers(response(502, "bad")), 502, "bad", nil},
		{"503 of the only one", answers(response(503, "busy", "Retry-After: 3\r\n")), 503, "busy", http.Header{"Retry-After": {"3"}}},
		{"504 of the only one", answers(response(504, "slow")), 504, "slow", nil},
		{"wrong accept", wrongAccept, 502, "", http.Header{"Sec-Websocket-Accept": nil}},
		{"no accept", answers("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"), 502, "", nil},
		{"101 without upgrade headers", accepts(""), 502, "", nil},
		{"101 without Upgrade", accepts("Connection: Upgrade\r\n"), 502, "", nil},
		{"101 without Connection", accepts("Upgrade: websocket\r\n"), 502, "", nil},
		{"101 to another protocol", accepts("Upgrade: h2c\r\nConnection: Upgrade\r\n"), 502, "", nil},
		{"subprotocol that was not offered", accepts("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: chat\r\n"), 502, "", nil},
		{"extension that was not offered", accepts("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Extensions: permessage-deflate\r\n"), 502, "", nil},
		{"no HTTP", answers("SSH-2.0-OpenSSH_9.6\r\n"), 502, "", nil},
		{"half a header", answers("HTTP/1.1 101 Switching Protocols\r\nUpgrade: webso"), 502, "", nil},
		{"endless header", answers("HTTP/1.1 101 Switching Protocols\r\n" + strings.Repeat("X-A: "+strings.Repeat("a", 1000)+"\r\n", 1200)), 502, "", nil},
		{"no answer", answers(""), 502, "", nil},
		{"reset", resets, 502, "", nil},
		{"silent", silent, 504, "", nil},
	}
	// The client names the row, so that one Caddy serves them all.
	backend := newCountedBackend(t, func(r *http.Request, c *rawConn) {
		for _, tt := range tests {
			if r.Header.Get("X-Row") == tt.name {
				tt.serve(r, c)
			}
		}
	})
	p := startCaddy(t, "", "websocket_proxy "+backend.addr+" {\n handshake_timeout 2s\n}")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := backend.dials.Load()
			res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, "X-Row: "+tt.name+"\r\n"))
			if got := body(t, res); res.StatusCode != tt.status || got != tt.body {
				t.Errorf("got %d %q, want %d %q", res.StatusCode, got, tt.status, tt.body)
			}
			for name, want := range tt.header {
				if got := res.Header[name]; !slices.Equal(got, want) {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
			if got := backend.dials.Load() - before; got != 1 {
				t.Errorf("dials: got %d, want 1", got)
			}
			p.emptyWithin(t, time.Second)
		})
	}
}

// A client that was refused may ask again over the same connection.
func TestRefusedClientAsksAgain(t *testing.T) {
	backend := rawBackend(t, func(r *http.Request, c *rawConn) {
		if r.Header.Get("Authorization") == "" {
			answers(response(401, "who?"))(r, c)
			return
		}
		echoRaw(r, c)
	})
	p := startCaddy(t, "", "websocket_proxy "+backend)
	res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
	if got := body(t, res); res.StatusCode != 401 || got != "who?" {
		t.Fatalf("got %d %q, want 401", res.StatusCode, got)
	}
	_, _ = io.WriteString(c, rawUpgrade(p.addr, "Authorization: Bearer x\r\n"))
	res, err := http.ReadResponse(c.br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("second request: got %+v, %v; want 101", res, err)
	}
	checkEcho(t, c)
}

// A refusal whose body breaks off breaks off at the client too, and leaves nothing.
func TestRefusalBreaksOff(t *testing.T) {
	for name, answer := range map[string]struct{ text, body string }{
		"declared":       {"HTTP/1.1 401 Unauthorized\r\nContent-Length: 100\r\n\r\nwho", "who"},
		"chunked":        {"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nwho\r\n", "who"},
		"before a byte":  {"HTTP/1.1 401 Unauthorized\r\nContent-Length: 100\r\n\r\n", ""},
		"before a chunk": {"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			backend := rawBackend(t, answers(answer.text))
			p := startCaddy(t, "", "websocket_proxy "+backend)
			res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
			if b, err := io.ReadAll(res.Body); res.StatusCode != 401 || string(b) != answer.body || err == nil {
				t.Errorf("got %d %q, %v; want 401 with %q of the body and an error", res.StatusCode, b, err, answer.body)
			}
			p.emptyWithin(t, time.Second)
		})
	}
}

// Two upstreams, whichever is asked first: the nth to be dialed does the nth step.
func TestNextUpstream(t *testing.T) {
	no := func(status int) script { return answers(response(status, fmt.Sprint("no ", status))) }
	tests := []struct {
		name   string
		steps  []script
		status int
		body   string
	}{
		{"502, then a WebSocket", []script{no(502), echoRaw}, 101, ""},
		{"503, then a WebSocket", []script{no(503), echoRaw}, 101, ""},
		{"504, then a WebSocket", []script{no(504), echoRaw}, 101, ""},
		{"wrong accept, then a WebSocket", []script{wrongAccept, echoRaw}, 101, ""},
		{"101 without headers, then a WebSocket", []script{accepts(""), echoRaw}, 101, ""},
		{"no answer, then a WebSocket", []script{answers(""), echoRaw}, 101, ""},
		{"reset, then a WebSocket", []script{resets, echoRaw}, 101, ""},
		{"silence, then a WebSocket", []script{silent, echoRaw}, 101, ""},
		{"503 twice", []script{answers(response(503, "first")), answers(response(503, "second"))}, 503, "second"},
		{"502, then 401", []script{no(502), no(401)}, 401, "no 401"},
		{"503, then reset", []script{no(503), resets}, 502, ""},
		{"503, then silence", []script{no(503), silent}, 504, ""},
		{"silence, then 503", []script{silent, no(503)}, 503, "no 503"},
		{"200", []script{no(200)}, 200, "no 200"},
		{"302", []script{no(302)}, 302, "no 302"},
		{"401", []script{no(401)}, 401, "no 401"},
		{"403", []script{no(403)}, 403, "no 403"},
		{"404", []script{no(404)}, 404, "no 404"},
		{"500", []script{no(500)}, 500, "no 500"},
		{"501", []script{no(501)}, 501, "no 501"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var turn atomic.Int32
			inTurn := func(r *http.Request, c *rawConn) {
				if n := int(turn.Add(1)) - 1; n < len(tt.steps) {
					tt.steps[n](r, c)
				}
			}
			a, b := newCountedBackend(t, inTurn), newCountedBackend(t, inTurn)
			p := startCaddy(t, "", "websocket_proxy "+a.addr+" "+b.addr+" {\n handshake_timeout 2s\n}")
			res, c := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
			if res.StatusCode != tt.status {
				t.Fatalf("status: got %d, want %d", res.StatusCode, tt.status)
			}
			if tt.status == http.StatusSwitchingProtocols {
				checkEcho(t, c)
			} else if got := body(t, res); got != tt.body {
				t.Errorf("body: got %q, want %q", got, tt.body)
			}
			if x, y := a.dials.Load(), b.dials.Load(); x > 1 || y > 1 || int(x+y) != len(tt.steps) {
				t.Errorf("dials: got %d and %d, want %d, at most one each", x, y, len(tt.steps))
			}
			p.emptyWithin(t, time.Second)
		})
	}
}

// One upstream is down: the other gets every client. Round robin, which counts
// the choices, asks the one that is down first at least once in two clients.
func TestUpstreamDown(t *testing.T) {
	backend := newCountedBackend(t, echoRaw)
	p := startCaddy(t, "", "websocket_proxy "+freeAddr(t)+" "+backend.addr+" {\n lb_policy round_robin\n}")
	for range 4 {
		checkEcho(t, rawDial(t, p.addr, ""))
	}
	if got := backend.dials.Load(); got != 4 {
		t.Errorf("dials: got %d, want 4", got)
	}
}

// The only upstream is down, and the last one is after a 503 of the first.
func TestLastUpstreamDown(t *testing.T) {
	t.Run("only one", func(t *testing.T) {
		p := startCaddy(t, "", "websocket_proxy "+freeAddr(t))
		if res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, "")); res.StatusCode != http.StatusBadGateway {
			t.Errorf("status: got %d, want 502", res.StatusCode)
		}
	})
	t.Run("after 503", func(t *testing.T) {
		var backends [2]*countedBackend
		ready := make(chan struct{}) // closed when backends is complete
		for i := range backends {
			backends[i] = newCountedBackend(t, func(r *http.Request, c *rawConn) {
				<-ready
				backends[1-i].Close()
				answers(response(503, "busy"))(r, c)
			})
		}
		close(ready)
		p := startCaddy(t, "", "websocket_proxy "+backends[0].addr+" "+backends[1].addr)
		res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
		if got := body(t, res); res.StatusCode != http.StatusBadGateway || got != "" {
			t.Errorf("got %d %q, want 502", res.StatusCode, got)
		}
	})
}

// An upstream whose host takes no more connections: 504 after dial_timeout, and
// a client that leaves before that leaves nothing.
func TestDialTimeout(t *testing.T) {
	addr := fullBacklog(t)
	t.Run("client waits", func(t *testing.T) {
		p := startCaddy(t, "", "websocket_proxy "+addr+" {\n dial_timeout 300ms\n}")
		began := time.Now()
		res, _ := rawRequest(t, p.addr, rawUpgrade(p.addr, ""))
		if took := time.Since(began); res.StatusCode != http.StatusGatewayTimeout || took < 250*time.Millisecond || took > 3*time.Second {
			t.Errorf("got %d after %s, want 504 after 300ms, and long before the default of 3s", res.StatusCode, took)
		}
	})
	t.Run("client leaves", func(t *testing.T) {
		p := startCaddy(t, "", "websocket_proxy "+addr+" {\n dial_timeout 1m\n}")
		conn := p.asking(t)
		if !eventually(10*time.Second, func() bool { return p.stats(t).ByState["connecting"] == 1 }) {
			t.Error("no connection is connecting")
		}
		conn.Close()
		p.emptyWithin(t, time.Second)
	})
}

// asking is a client that has sent its handshake and waits.
func (p *proxy) asking(t testing.TB) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(15 * time.Second))
	if _, err := io.WriteString(conn, rawUpgrade(p.addr, "")); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// fullBacklog listens and never accepts, with as many connections waiting as
// its kernel lets wait: what comes after them is not answered.
func fullBacklog(t testing.TB) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	for range 16 {
		conn, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the backlog does not fill up")
	return ""
}
