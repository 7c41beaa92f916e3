package e2e

import (
	"bufio"
	bits "encoding/binary"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
)

// This file tests what becomes of a peer that breaks RFC 6455.

// The first byte of frames (RFC 6455 §5.2).
const (
	fin                     = 0x80
	rsv1, rsv2, rsv3        = 0x40, 0x20, 0x10
	more, text, binaryOp    = 0x0, 0x1, 0x2 // continuation, text, binary
	closeOp, pingOp, pongOp = 0x8, 0x9, 0xa
)

// wireFrame is a frame with any first byte. extended is the length field's first
// seven bits if they are not to be the shortest right ones: 126 or 127.
func wireFrame(first byte, payload string, masked bool, extended byte) []byte {
	length := extended
	if length == 0 {
		switch n := len(payload); {
		case n < 126:
			length = byte(n)
		case n < 1<<16:
			length = 126
		default:
			length = 127
		}
	}
	second := length
	if masked {
		second |= 0x80
	}
	b := []byte{first, second}
	switch length {
	case 126:
		b = bits.BigEndian.AppendUint16(b, uint16(len(payload)))
	case 127:
		b = bits.BigEndian.AppendUint64(b, uint64(len(payload)))
	}
	if !masked {
		return append(b, payload...)
	}
	mask := [4]byte{1, 2, 3, 4}
	b = append(b, mask[:]...)
	body := []byte(payload)
	ws.Cipher(body, mask, 0)
	return append(b, body...)
}

// offence is what a peer does wrong: legal frames that lead to it, which are
// passed on, and the frame that must not be. masked is as the peer has to.
type offence struct {
	name string
	lead []byte // the first bytes of the leading frames, each with the payload "lead"
	bad  func(masked bool) []byte
}

// plain is an offence by a frame whose first byte or payload is wrong.
func plain(name string, first byte, payload string, lead ...byte) offence {
	return offence{name, lead, func(masked bool) []byte { return wireFrame(first, payload, masked, 0) }}
}

// badClose is an offence by a close frame's payload.
func badClose(name, payload string) offence { return plain(name, fin|closeOp, payload) }

// code is a close code on the wire.
func code(c uint16) string { return string(bits.BigEndian.AppendUint16(nil, c)) }

// offences are all that both sides can commit.
func offences() []offence {
	list := []offence{
		plain("RSV1", fin|rsv1|text, "bad"),
		plain("RSV2", fin|rsv2|text, "bad"),
		plain("RSV3", fin|rsv3|binaryOp, "bad"),
		plain("all reserved bits", fin|rsv1|rsv2|rsv3|text, "bad"),
		plain("RSV1 on a ping", fin|rsv1|pingOp, "bad"),
		plain("RSV1 on a close", fin|rsv1|closeOp, code(1000)),
		plain("RSV1 on a continuation", fin|rsv1|more, "bad", text),
		plain("continuation without start", fin|more, "bad"),
		plain("continuation after a message's end", fin|more, "bad", text, fin|more),
		plain("new text inside a message", fin|text, "bad", text),
		plain("new binary inside a message", binaryOp, "bad", binaryOp, more),
		plain("ping of 126 bytes", fin|pingOp, strings.Repeat("p", 126)),
		plain("pong of 65536 bytes", fin|pongOp, strings.Repeat("p", 1<<16)),
		plain("close of 126 bytes", fin|closeOp, code(1000)+strings.Repeat("r", 124)),
		plain("fragmented ping", pingOp, "bad"),
		plain("fragmented pong", pongOp, "bad"),
		plain("fragmented close", closeOp, code(1000)),
		badClose("close of one byte", "\x03"),
		badClose("reason that is not UTF-8", code(1000)+"a\xc3"),
		badClose("reason with a surrogate", code(1000)+"\xed\xa0\x80"),
		{"wrong masking", nil, func(masked bool) []byte { return wireFrame(fin|text, "bad", !masked, 0) }},
		{"wrong masking of a close", nil, func(masked bool) []byte { return wireFrame(fin|closeOp, code(1000), !masked, 0) }},
		{"16-bit length of 125", nil, func(masked bool) []byte { return wireFrame(fin|text, strings.Repeat("b", 125), masked, 126) }},
		{"64-bit length of 65535", nil, func(masked bool) []byte { return wireFrame(fin|text, strings.Repeat("b", 1<<16-1), masked, 127) }},
		{"16-bit length of a ping", nil, func(masked bool) []byte { return wireFrame(fin|pingOp, "bad", masked, 126) }},
		{"64-bit length with the top bit", nil, func(masked bool) []byte {
			b := wireFrame(fin|binaryOp, "bad", masked, 127)
			b[2] |= 0x80
			return b
		}},
	}
	for op := byte(0x3); op <= 0xf; op++ {
		if op < closeOp || op > pongOp {
			list = append(list, plain(fmt.Sprintf("opcode %#x", op), fin|op, "bad"))
		}
	}
	for _, c := range []uint16{0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535} {
		list = append(list, badClose(fmt.Sprint("close code ", c), code(c)))
	}
	return list
}

// pairing is a proxy of whose connections the test plays both ends.
type pairing struct {
	*proxy
	ln net.Listener // the backend
}

// startPairing runs a proxy before a backend that the test plays.
func startPairing(t testing.TB, globals, options string) *pairing {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return &pairing{startCaddy(t, globals, "websocket_proxy "+ln.Addr().String()+" {\n resume_timeout off\n"+options+"\n}"), ln}
}

// link is a connection whose both ends the test plays.
type link struct {
	client, backend *rawConn
	request         *http.Request  // what the backend got
	response        *http.Response // what the client got
}

// open makes a connection. What is in early follows the client's handshake in
// the same write; answer are lines and, after an empty one, bytes of the backend's.
func (p *pairing) open(t testing.TB, early string, answer ...string) *link {
	t.Helper()
	return p.openBy(t, rawUpgrade(p.addr, "")+early, answer...)
}

// openBy makes a connection by the given request.
func (p *pairing) openBy(t testing.TB, request string, answer ...string) *link {
	t.Helper()
	accepted := make(chan *link, 1)
	go acceptOne(p.ln, accepted, strings.Join(answer, ""))
	res, client := rawRequest(t, p.addr, request)
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status: got %d, want 101", res.StatusCode)
	}
	l := <-accepted
	t.Cleanup(func() { l.backend.Close() })
	l.client, l.response = client, res
	return l
}

// acceptOne does one handshake as a backend and hands the connection over. It
// ends with that, or when the listener is closed. Without an empty line in
// answer one is added.
func acceptOne(ln net.Listener, accepted chan<- *link, answer string) {
	conn, err := ln.Accept()
	if err != nil {
		return
	}
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	br := bufio.NewReader(conn)
	r, err := http.ReadRequest(br)
	if err != nil {
		conn.Close()
		return
	}
	if !strings.Contains("\r\n"+answer, "\r\n\r\n") {
		answer += "\r\n"
	}
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n%s",
		handshake.AcceptKey(r.Header.Get("Sec-WebSocket-Key")), answer)
	accepted <- &link{backend: &rawConn{Conn: conn, br: br}, request: r}
}

// only returns the one connection, which must soon be open: the client's 101 is
// sent before that.
func (p *pairing) only(t testing.TB) connection {
	t.Helper()
	var list []connection
	if !eventually(10*time.Second, func() bool { list = p.connections(t); return len(list) == 1 && list[0].State == "open" }) {
		t.Fatalf("connections: got %+v, want one that is open", list)
	}
	return list[0]
}

// ended checks that since before exactly one connection ended, for the given
// reason, and that nothing is left of it within limit.
func (p *pairing) ended(t testing.TB, before stats, reason string, limit time.Duration) {
	t.Helper()
	p.emptyWithin(t, limit)
	after := p.stats(t)
	for r, n := range after.ClosedByReason {
		want := before.ClosedByReason[r]
		if r == reason {
			want++
		}
		if n != want {
			t.Errorf("ended by %s: got %d more, want %d", r, n-before.ClosedByReason[r], want-before.ClosedByReason[r])
		}
	}
	if after.ClosedByReason[reason] == 0 {
		t.Errorf("ended by %s: got none", reason)
	}
}

// Nothing of an offending frame, nor of what follows it, is passed on; what came
// before it is. Both sides are told, and why is recorded.
func TestOffenders(t *testing.T) {
	p := startPairing(t, "", "")
	for _, o := range offences() {
		t.Run("client/"+o.name, func(t *testing.T) {
			l := p.open(t, "")
			p.offend(t, o, l.client, l.backend, "client_protocol", 1001)
		})
		t.Run("backend/"+o.name, func(t *testing.T) {
			l := p.open(t, "")
			p.offend(t, o, l.backend, l.client, "backend_protocol", 1014)
		})
	}
}

// offend lets one end of a connection offend, and checks what both get.
func (p *pairing) offend(t *testing.T, o offence, offender, other *rawConn, reason string, otherGets uint16) {
	before := p.stats(t)
	offender.send(t, ws.OpText, "good")
	if h, payload, err := other.receive(); err != nil || h.OpCode != ws.OpText || payload != "good" {
		t.Fatalf("good frame: got %v %q, %v", h.OpCode, payload, err)
	}
	// One write: the proxy finds good and bad side by side.
	burst := frame.Append(nil, ws.OpBinary, []byte("also good"), offender.client)
	want := []string{fmt.Sprintf("%v %q", ws.OpBinary, "also good")}
	for _, first := range o.lead {
		burst = append(burst, wireFrame(first, "lead", offender.client, 0)...)
		want = append(want, fmt.Sprintf("%v %q", ws.OpCode(first&0xf), "lead"))
	}
	burst = append(burst, o.bad(offender.client)...)
	burst = frame.Append(burst, ws.OpText, []byte("after"), offender.client)
	if _, err := offender.Write(burst); err != nil {
		t.Fatal(err)
	}

	code, _, got, err := other.receiveClose()
	if err != nil || code != otherGets || !slices.Equal(got, want) {
		t.Errorf("the other side: got %d after %q, %v; want %d after %q", code, got, err, otherGets, want)
	}
	_, _ = other.Write(frame.AppendClose(nil, code, "", other.client))
	code, _, got, err = offender.receiveClose()
	if err != nil || code != 1002 || len(got) > 0 {
		t.Errorf("the offender: got %d after %q, %v; want 1002", code, got, err)
	}
	_, _ = offender.Write(frame.AppendClose(nil, code, "", offender.client))
	_ = other.tcp().CloseWrite()
	_ = offender.tcp().CloseWrite()
	other.leave(t)
	offender.leave(t)
	p.ended(t, before, reason, time.Second)
}

// tcp returns the connection itself.
func (c *rawConn) tcp() *net.TCPConn { return c.Conn.(*net.TCPConn) }

// leave checks that the proxy has nothing more to say, and closes.
func (c *rawConn) leave(t testing.TB) {
	t.Helper()
	if h, payload, err := c.receive(); err == nil {
		t.Errorf("got %v %q, want the end", h.OpCode, payload)
	}
	c.Close()
}
