// This file tests the handshake with backends that answer by a script.

package handshake

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// scripted is a backend that answers a request with its script, in which
// "{accept}" stands for the right Sec-WebSocket-Accept.
type scripted struct {
	script  string
	request bytes.Buffer
	answer  io.Reader
	slow    bool  // one byte at each Read
	then    error // instead of EOF
}

func (s *scripted) Write(p []byte) (int, error) { return s.request.Write(p) }

func (s *scripted) Read(p []byte) (int, error) {
	if s.answer == nil {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(s.request.Bytes())))
		if err != nil {
			return 0, err
		}
		s.answer = strings.NewReader(strings.ReplaceAll(s.script, "{accept}", AcceptKey(r.Header.Get("Sec-Websocket-Key"))))
		if s.slow {
			s.answer = iotest.OneByteReader(s.answer)
		}
	}
	n, err := s.answer.Read(p)
	if err == io.EOF && s.then != nil {
		err = s.then
	}
	return n, err
}

var testUpstream = Upstream{Network: "tcp", Address: "10.0.0.1:8080"}

// newRequest is NewRequest of a request that is no attack.
func newRequest(t *testing.T, r *http.Request, id string, trusted bool, offer deflate.Negotiation) *Request {
	t.Helper()
	q, err := NewRequest(r, Client{ID: id, IP: "192.0.2.1", Trusted: trusted}, offer, nil)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// asked is a request that offers the subprotocols chat and superchat, and
// compression.
func asked(t *testing.T) *Request {
	t.Helper()
	r := received(t, get, "Sec-WebSocket-Protocol: chat", "Sec-WebSocket-Protocol: superchat,", "Sec-WebSocket-Extensions: permessage-deflate")
	return newRequest(t, r, "id", false, deflate.Negotiate(r.Header["Sec-Websocket-Extensions"], deflate.On))
}

// switching is an answer of 101 with what makes it good, and more lines.
func switching(lines ...string) string {
	good := []string{"Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Accept: {accept}"}
	var b strings.Builder
	b.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	all := strings.ToLower("\n" + strings.Join(lines, "\n"))
	for _, line := range good {
		name, _, _ := strings.Cut(strings.ToLower(line), ":")
		if !strings.Contains(all, "\n"+name+":") {
			b.WriteString(line + "\r\n")
		}
	}
	for _, line := range lines {
		if !strings.HasSuffix(line, ":") {
			b.WriteString(line + "\r\n")
		}
	}
	return b.String() + "\r\n"
}

func TestDoOpensATunnelForATrue101Only(t *testing.T) {
	hint := "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
	for _, test := range []struct {
		name, script string
		ok           bool
		subprotocol  string
		compressed   bool
		early        string
	}{
		{"plain", switching(), true, "", false, ""},
		{"case", switching("Upgrade: WebSocket", "Connection: UPGRADE"), true, "", false, ""},
		{"other tokens", switching("Connection: keep-alive, Upgrade"), true, "", false, ""},
		{"lines ended by LF alone", strings.ReplaceAll(switching(), "\r\n", "\n"), true, "", false, ""},
		{"subprotocol", switching("Sec-WebSocket-Protocol: superchat"), true, "superchat", false, ""},
		{"compression", switching("Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover"), true, "", true, ""},
		{"early bytes", switching() + "\x81\x05hello\x89", true, "", false, "\x81\x05hello\x89"},
		{"early bytes that look like HTTP", switching() + "HTTP/1.1 200 OK\r\n\r\n", true, "", false, "HTTP/1.1 200 OK\r\n\r\n"},
		{"early hints", hint + switching(), true, "", false, ""},
		{"100 and 102", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + switching(), true, "", false, ""},
		{"five 1xx, which is maxInformational", strings.Repeat(hint, 5) + switching(), true, "", false, ""},
		{"body declared, which a 101 cannot have", switching("Content-Length: 5") + "hello", true, "", false, "hello"},
		{"large header", switching("X-Large: " + strings.Repeat("x", 500_000)), true, "", false, ""},

		{"no Upgrade", switching("Upgrade:"), false, "", false, ""},
		{"no Connection", switching("Connection:"), false, "", false, ""},
		{"another Upgrade", switching("Upgrade: h2c"), false, "", false, ""},
		{"another Connection", switching("Connection: close"), false, "", false, ""},
		{"no accept", switching("Sec-WebSocket-Accept:"), false, "", false, ""},
		{"wrong accept", switching("Sec-WebSocket-Accept: " + sampleAccept), false, "", false, ""},
		{"accept twice", switching("Sec-WebSocket-Accept: {accept}", "Sec-WebSocket-Accept: {accept}"), false, "", false, ""},
		{"accept and more", switching("Sec-WebSocket-Accept: {accept}, {accept}"), false, "", false, ""},
		{"accept in another case", switching("Sec-WebSocket-Accept: x{accept}"), false, "", false, ""},
		{"subprotocol not offered", switching("Sec-WebSocket-Protocol: mqtt"), false, "", false, ""},
		{"subprotocol in another case", switching("Sec-WebSocket-Protocol: Chat"), false, "", false, ""},
		{"two subprotocols", switching("Sec-WebSocket-Protocol: chat", "Sec-WebSocket-Protocol: superchat"), false, "", false, ""},
		{"two subprotocols in one", switching("Sec-WebSocket-Protocol: chat, superchat"), false, "", false, ""},
		{"extension not offered", switching("Sec-WebSocket-Extensions: x-unknown"), false, "", false, ""},
		{"compression with a bad parameter", switching("Sec-WebSocket-Extensions: permessage-deflate; x=1"), false, "", false, ""},
		{"endless 1xx", strings.Repeat(hint, 1000) + switching(), false, "", false, ""},
		{"six 1xx", strings.Repeat(hint, 6) + switching(), false, "", false, ""},
		{"huge header", switching("X-Huge: " + strings.Repeat("x", 2<<20)), false, "", false, ""},
		{"many headers", switching(strings.Repeat("X-Many: x\r\n", 200_000) + "X-Last: x"), false, "", false, ""},
		{"huge header before the end of a 1xx", "HTTP/1.1 103 Early Hints\r\nX: " + strings.Repeat("x", 2<<20) + "\r\n\r\n" + switching(), false, "", false, ""},
		{"nothing", "", false, "", false, ""},
		{"half a status line", "HTTP/1.1 10", false, "", false, ""},
		{"half a header", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: webso", false, "", false, ""},
		{"garbage", "\x16\x03\x01\x00\x00garbage\r\n\r\n", false, "", false, ""},
		{"another protocol", "SSH-2.0-OpenSSH_9.9\r\n", false, "", false, ""},
		{"status without a meaning", "HTTP/1.1 1010 Nope\r\n\r\n", false, "", false, ""},
		{"header without a colon", "HTTP/1.1 101 Switching Protocols\r\nUpgrade websocket\r\n\r\n", false, "", false, ""},
		{"WebSocket frames at once", "\x81\x05hello", false, "", false, ""},
	} {
		for name, slow := range map[string]bool{"at once": false, "byte by byte": true} {
			if slow && (len(test.script) > 100_000 || test.early != "") {
				continue // what is early depends on the timing
			}
			t.Run(test.name+"/"+name, func(t *testing.T) {
				got, err := asked(t).Do(&scripted{script: test.script, slow: slow}, testUpstream)
				if !test.ok {
					if err == nil {
						t.Fatalf("got status %d, upgraded %t, want an error", got.HTTP.StatusCode, got.Upgraded)
					}
					if got != nil {
						t.Errorf("got a response beside error %v, want none", err)
					}
					return
				}
				if err != nil {
					t.Fatalf("got error %v, want none", err)
				}
				if !got.Upgraded || got.Subprotocol != test.subprotocol || got.Compression.Compressed() != test.compressed || string(got.Early) != test.early {
					t.Errorf("got upgraded %t, subprotocol %q, compressed %t, early %q, want true, %q, %t, %q",
						got.Upgraded, got.Subprotocol, got.Compression.Compressed(), got.Early, test.subprotocol, test.compressed, test.early)
				}
			})
		}
	}
}

func TestDoReturnsOtherAnswersWithTheirBody(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", 200_000) // more than maxResponseHeader
	for _, test := range []struct {
		name, script string
		status       int
		body         string
		bodyErr      bool
	}{
		{"forbidden", "HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nno!\n", 403, "no!\n", false},
		{"without a body", "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 404, "", false},
		{"no content", "HTTP/1.1 204 No Content\r\n\r\n", 204, "", false},
		{"redirect, not followed", "HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", 302, "", false},
		{"chunked", "HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", 401, "hello world", false},
		{"until the end of the connection", "HTTP/1.0 500 Internal Server Error\r\n\r\nbye", 500, "bye", false},
		{"long body", "HTTP/1.1 200 OK\r\nContent-Length: " + strconv.Itoa(len(large)) + "\r\n\r\n" + large, 200, large, false},
		{"after early hints", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno", 503, "no", false},
		{"headers of an upgrade, but 200", strings.Replace(switching("Content-Length: 2"), "101", "200", 1) + "ok", 200, "ok", false},
		{"body cut short", "HTTP/1.1 400 Bad Request\r\nContent-Length: 10\r\n\r\nhalf", 400, "half", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := asked(t).Do(&scripted{script: test.script}, testUpstream)
			if err != nil {
				t.Fatalf("got error %v, want none", err)
			}
			if got.Upgraded || got.HTTP.StatusCode != test.status {
				t.Fatalf("got status %d, upgraded %t, want %d", got.HTTP.StatusCode, got.Upgraded, test.status)
			}
			body, err := io.ReadAll(got.HTTP.Body)
			if string(body) != test.body || (err != nil) != test.bodyErr {
				t.Errorf("got a body of %d bytes, error %v, want %d bytes", len(body), err, len(test.body))
			}
		})
	}
}

// Also where the last line is incomplete, which a parser may blame first: a
// timeout there is a timeout, no bad answer.
func TestDoPassesConnectionErrorsOn(t *testing.T) {
	reset := errors.New("connection reset by peer")
	for _, test := range []struct{ name, script string }{
		{"at once", ""},
		{"inside the header", "HTTP/1.1 101 Switching Protocols\r\nUpgr"},
		{"between 1xx and the answer", "HTTP/1.1 103 Early Hints\r\n\r\n"},
	} {
		if _, err := asked(t).Do(&scripted{script: test.script, then: reset}, testUpstream); !errors.Is(err, reset) {
			t.Errorf("reset %s: got error %v, want it to wrap the connection's", test.name, err)
		}
	}
	if _, err := asked(t).Do(brokenPipe{}, testUpstream); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write refused: got error %v, want it to wrap the connection's", err)
	}
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
func (brokenPipe) Read([]byte) (int, error)  { return 0, io.ErrUnexpectedEOF }

// A backend that is silent is bounded by the connection's deadline, and the
// error says that it was a timeout.
func TestDoEndsAtTheDeadline(t *testing.T) {
	near, far := net.Pipe()
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	go func() { _, _ = io.Copy(io.Discard, far) }() // until both ends are closed
	_ = near.SetDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := asked(t).Do(near, testUpstream)
	var timeout net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("got error %v, want a timeout", err)
	}
}

func TestDoSendsADifferentKeyEachTime(t *testing.T) {
	q, seen := asked(t), map[string]bool{}
	for range 8 {
		backend := &scripted{script: switching()}
		if _, err := q.Do(backend, testUpstream); err != nil {
			t.Fatal(err)
		}
		r, err := http.ReadRequest(bufio.NewReader(&backend.request))
		if err != nil {
			t.Fatal(err)
		}
		key := r.Header.Get("Sec-Websocket-Key")
		if !validKey([]string{key}) {
			t.Errorf("got key %q, want 16 bytes in base64", key)
		}
		seen[key] = true
	}
	if len(seen) != 8 {
		t.Errorf("got %d different keys in 8 handshakes, want 8", len(seen))
	}
}
