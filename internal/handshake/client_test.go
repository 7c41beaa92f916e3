// This file tests what a client's request must be.

package handshake

import (
	"bufio"
	"net/http"
	"strings"
	"testing"
)

// sampleKey and sampleAccept are those of RFC 6455 §1.3.
const (
	sampleKey    = "dGhlIHNhbXBsZSBub25jZQ=="
	sampleAccept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
)

// received is a request as net/http gives it to a handler. lines are added to
// those of a good handshake; one that repeats a name replaces that line, and one
// without a value removes it.
func received(t *testing.T, requestLine string, lines ...string) *http.Request {
	t.Helper()
	good := []string{
		"Host: example.com", "Connection: Upgrade", "Upgrade: websocket",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: " + sampleKey,
	}
	var b strings.Builder
	b.WriteString(requestLine + "\r\n")
	for _, line := range good {
		name, _, _ := strings.Cut(line, ":")
		if !strings.Contains("\n"+strings.ToLower(strings.Join(lines, "\n")), "\n"+strings.ToLower(name)+":") {
			b.WriteString(line + "\r\n")
		}
	}
	for _, line := range lines {
		if !strings.HasSuffix(line, ":") {
			b.WriteString(line + "\r\n")
		}
	}
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(b.String() + "\r\n")))
	if err != nil {
		t.Fatalf("reading the test's request: %v", err)
	}
	r.RemoteAddr = "192.0.2.1:1234"
	return r
}

const get = "GET /chat HTTP/1.1"

func TestIsUpgrade(t *testing.T) {
	for _, test := range []struct {
		name, requestLine string
		lines             []string
		want              bool
	}{
		{"as browsers do", get, nil, true},
		{"case", get, []string{"Upgrade: WebSocket", "Connection: uPGRADE"}, true},
		{"Firefox", get, []string{"Connection: keep-alive, Upgrade"}, true},
		{"several lines", get, []string{"Connection: keep-alive", "Connection: upgrade"}, true},
		{"several protocols", get, []string{"Upgrade: h2c, websocket"}, true},
		{"no spaces, empty elements", get, []string{"Connection: ,keep-alive,,upgrade,"}, true},
		{"a POST, which Check refuses", "POST /chat HTTP/1.1", nil, true},
		{"a wrong version, which Check refuses", get, []string{"Sec-WebSocket-Version: 8"}, true},
		{"no key, which Check refuses", get, []string{"Sec-WebSocket-Key:"}, true},
		{"plain request", get, []string{"Upgrade:", "Connection:"}, false},
		{"no Upgrade", get, []string{"Upgrade:"}, false},
		{"no Connection", get, []string{"Connection:"}, false},
		{"another protocol", get, []string{"Upgrade: h2c"}, false},
		{"another token", get, []string{"Connection: keep-alive"}, false},
		{"part of a token", get, []string{"Connection: upgraded"}, false},
		{"protocol with a version", get, []string{"Upgrade: websocket/13"}, false},
		{"token in another's place", get, []string{"Connection: websocket", "Upgrade: upgrade"}, false},
		{"HTTP/1.0", "GET /chat HTTP/1.0", nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := IsUpgrade(received(t, test.requestLine, test.lines...)); got != test.want {
				t.Errorf("got %t, want %t", got, test.want)
			}
		})
	}
	r := received(t, get)
	r.ProtoMajor, r.ProtoMinor = 2, 0
	if IsUpgrade(r) {
		t.Error("HTTP/2: got true, want false")
	}
}

func TestCheck(t *testing.T) {
	for _, test := range []struct {
		name, requestLine string
		lines             []string
		status            int
		header, value     string
	}{
		{"good", get, nil, 0, "", ""},
		{"declared empty body", get, []string{"Content-Length: 0"}, 0, "", ""},
		{"key without a meaning", get, []string{"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="}, 0, "", ""},
		{"POST", "POST /chat HTTP/1.1", nil, 405, "Allow", "GET"},
		{"HEAD", "HEAD /chat HTTP/1.1", nil, 405, "Allow", "GET"},
		{"lower case method", "get /chat HTTP/1.1", nil, 405, "Allow", "GET"},
		{"declared body", get, []string{"Content-Length: 1"}, 400, "Connection", "close"},
		{"chunked body", get, []string{"Transfer-Encoding: chunked"}, 400, "Connection", "close"},
		{"no version", get, []string{"Sec-WebSocket-Version:"}, 426, "Sec-Websocket-Version", "13"},
		{"old version", get, []string{"Sec-WebSocket-Version: 8"}, 426, "Sec-Websocket-Version", "13"},
		{"old version: another is asked for", get, []string{"Sec-WebSocket-Version: 8"}, 426, "Upgrade", "websocket"},
		{"old version: for this hop", get, []string{"Sec-WebSocket-Version: 8"}, 426, "Connection", "Upgrade"},
		{"list of versions", get, []string{"Sec-WebSocket-Version: 13, 8"}, 426, "Sec-Websocket-Version", "13"},
		{"version twice", get, []string{"Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 13"}, 426, "Sec-Websocket-Version", "13"},
		{"version spelled otherwise", get, []string{"Sec-WebSocket-Version: 013"}, 426, "Sec-Websocket-Version", "13"},
		{"no key", get, []string{"Sec-WebSocket-Key:"}, 400, "", ""},
		{"key twice", get, []string{"Sec-WebSocket-Key: " + sampleKey, "Sec-WebSocket-Key: " + sampleKey}, 400, "", ""},
		{"short key", get, []string{"Sec-WebSocket-Key: c2hvcnQ="}, 400, "", ""},
		{"key of 17 bytes", get, []string{"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAAA="}, 400, "", ""},
		{"key without padding", get, []string{"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ"}, 400, "", ""},
		{"key of another alphabet", get, []string{"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j_Q=="}, 400, "", ""},
		// What is wrong first decides, in the order method, body, version, key.
		{"all wrong", "POST /chat HTTP/1.1", []string{"Content-Length: 1", "Sec-WebSocket-Version: 8", "Sec-WebSocket-Key:"}, 405, "Allow", "GET"},
		{"all but the method wrong", get, []string{"Content-Length: 1", "Sec-WebSocket-Version: 8", "Sec-WebSocket-Key:"}, 400, "Connection", "close"},
		{"version and key wrong", get, []string{"Sec-WebSocket-Version: 8", "Sec-WebSocket-Key:"}, 426, "Sec-Websocket-Version", "13"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := Check(received(t, test.requestLine, test.lines...), nil)
			if got == nil || test.status == 0 {
				if got != nil || test.status != 0 {
					t.Fatalf("got %+v, want status %d", got, test.status)
				}
				return
			}
			if got.Status != test.status || got.Err == nil || got.Err.Error() == "" {
				t.Errorf("got status %d, error %v, want %d and an error", got.Status, got.Err, test.status)
			}
			if test.header == "" && len(got.Header) > 0 || test.header != "" && got.Header.Get(test.header) != test.value {
				t.Errorf("got header %v, want %s: %s", got.Header, test.header, test.value)
			}
		})
	}
}

func TestAcceptKey(t *testing.T) {
	if got := AcceptKey(sampleKey); got != sampleAccept {
		t.Errorf("got %q, want %q (RFC 6455 §1.3)", got, sampleAccept)
	}
}
