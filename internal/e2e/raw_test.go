package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
)

// testKey is the key of RFC 6455 §1.3.
const testKey = "dGhlIHNhbXBsZSBub25jZQ=="

// rawConn is one side of a WebSocket, byte by byte.
type rawConn struct {
	net.Conn
	br     *bufio.Reader
	client bool // this side is the client: it masks
}

// rawUpgrade is a client's handshake; extra lines end with CRLF.
func rawUpgrade(host, extra string) string {
	return "GET /chat?x=1 HTTP/1.1\r\nHost: " + host + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + testKey + "\r\n" + extra + "\r\n"
}

// rawRequest sends a request as it is and returns the response.
func rawRequest(t testing.TB, addr, request string) (*http.Response, *rawConn) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatalf("reading response: %v", err)
	}
	return res, &rawConn{Conn: conn, br: br, client: true}
}

// rawDial opens a WebSocket as a client that does exactly what it is told.
func rawDial(t testing.TB, addr, extra string) *rawConn {
	t.Helper()
	res, c := rawRequest(t, addr, rawUpgrade(addr, extra))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status: got %d, want 101", res.StatusCode)
	}
	return c
}

// send writes a complete frame.
func (c *rawConn) send(t testing.TB, op ws.OpCode, payload string) {
	t.Helper()
	if _, err := c.Write(frame.Append(nil, op, []byte(payload), c.client)); err != nil {
		t.Fatal(err)
	}
}

// sendClose writes a close frame.
func (c *rawConn) sendClose(t testing.TB, code uint16, reason string) {
	t.Helper()
	if _, err := c.Write(frame.AppendClose(nil, code, reason, c.client)); err != nil {
		t.Fatal(err)
	}
}

// pingThrough has the backend answer a ping, which pass end to end: now the proxy knows
// that this upstream answers pings, and judges it by its silence.
func (c *rawConn) pingThrough(t testing.TB) {
	t.Helper()
	const payload = "are you there"
	c.send(t, ws.OpPing, payload)
	for {
		h, got, err := c.receive()
		if err != nil {
			t.Fatalf("no pong comes: %v", err)
		}
		if h.OpCode == ws.OpPong && got == payload {
			return
		}
	}
}

// receive reads one frame and returns it with its payload unmasked.
func (c *rawConn) receive() (ws.Header, string, error) {
	h, err := ws.ReadHeader(c.br)
	if err != nil {
		return h, "", err
	}
	payload := make([]byte, h.Length)
	if _, err := io.ReadFull(c.br, payload); err != nil {
		return h, "", err
	}
	if h.Masked {
		ws.Cipher(payload, h.Mask, 0)
	}
	return h, string(payload), nil
}

// receiveClose reads until a close frame and returns its code and reason; other
// frames that come before it are returned as one string each.
func (c *rawConn) receiveClose() (code uint16, reason string, before []string, err error) {
	for {
		h, payload, err := c.receive()
		if err != nil {
			return 0, "", before, err
		}
		if h.OpCode != ws.OpClose {
			before = append(before, fmt.Sprintf("%v %q", h.OpCode, payload))
			continue
		}
		if len(payload) < 2 {
			return frame.NoStatus, "", before, nil
		}
		return uint16(payload[0])<<8 | uint16(payload[1]), payload[2:], before, nil
	}
}

// rawBackend listens and gives every accepted connection to serve, after its
// request was read. It returns the address.
func rawBackend(t testing.TB, serve func(r *http.Request, c *rawConn)) string {
	t.Helper()
	return tcpBackend(t, afterRequest(serve))
}

// acceptRaw is acceptTCP for what serves requests.
func acceptRaw(ln net.Listener, serve func(*http.Request, *rawConn), done chan<- struct{}) {
	acceptTCP(ln, afterRequest(serve), done)
}

// afterRequest reads the request of a connection before that is served.
func afterRequest(serve func(*http.Request, *rawConn)) func(net.Conn) {
	return func(conn net.Conn) {
		br := bufio.NewReader(conn)
		if r, err := http.ReadRequest(br); err == nil {
			serve(r, &rawConn{Conn: conn, br: br})
		}
	}
}

// accept answers a handshake with a 101; extra lines end with CRLF.
func (c *rawConn) accept(r *http.Request, extra ...string) error {
	_, err := fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n%s\r\n",
		handshake.AcceptKey(r.Header.Get("Sec-WebSocket-Key")), strings.Join(extra, ""))
	return err
}

// echoRaw is a backend that sends frames back as they come, fragments and all,
// until a close frame, which it echoes.
func echoRaw(r *http.Request, c *rawConn) {
	if c.accept(r) != nil {
		return
	}
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		h.Masked, h.Mask = false, [4]byte{}
		if h.OpCode == ws.OpPing {
			h.OpCode = ws.OpPong
		}
		if err := ws.WriteHeader(c, h); err != nil {
			return
		}
		if _, err := io.WriteString(c, payload); err != nil || h.OpCode == ws.OpClose {
			return
		}
	}
}
