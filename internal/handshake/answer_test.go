// This file tests what of a backend's answer reaches the client.

package handshake

import (
	"net/http"
	"testing"
)

func TestAnswerHeader(t *testing.T) {
	res, err := asked(t).Do(&scripted{script: switching(
		"Connection: Upgrade, X-Hop", "X-Hop: 1", "Keep-Alive: timeout=5", "Set-Cookie: a=1", "Set-Cookie: b=2",
		"Server: backend", "Date: Thu, 01 Jan 1970 00:00:00 GMT", "X-Kept: yes", "Content-Length: 0",
		"Sec-WebSocket-Protocol: chat", "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=10; client_no_context_takeover",
	)}, testUpstream)
	if err != nil {
		t.Fatal(err)
	}
	h := http.Header{"Server": {"Caddy"}, "Date": {"now"}, "Alt-Svc": {"h3"}, "Set-Cookie": {"own=1"}}
	res.AnswerHeader(h, sampleKey, Down{})
	compareHeader(t, h, http.Header{
		"Upgrade": {"websocket"}, "Connection": {"Upgrade"},
		"Sec-WebSocket-Accept":     {sampleAccept},
		"Sec-WebSocket-Protocol":   {"chat"},
		"Sec-WebSocket-Extensions": {"permessage-deflate; client_no_context_takeover"},
		"Set-Cookie":               {"own=1", "a=1", "b=2"},
		"Server":                   {"backend"}, "Date": {"Thu, 01 Jan 1970 00:00:00 GMT"},
		"X-Kept": {"yes"}, "Alt-Svc": {"h3"},
	})
	if res.HTTP.Header.Get("X-Hop") != "1" {
		t.Error("the backend's own header was changed")
	}
}

func TestAnswerHeaderSaysNothingThatWasNotAgreed(t *testing.T) {
	res, err := asked(t).Do(&scripted{script: switching()}, testUpstream)
	if err != nil {
		t.Fatal(err)
	}
	h := http.Header{}
	res.AnswerHeader(h, sampleKey, Down{})
	compareHeader(t, h, http.Header{"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-WebSocket-Accept": {sampleAccept}})
}

func TestRelayHeader(t *testing.T) {
	for _, test := range []struct {
		name, script string
		want         http.Header
	}{
		{
			"declared length",
			"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: x\r\n" +
				"Upgrade: h2c\r\nProxy-Authenticate: Basic\r\nWWW-Authenticate: Basic\r\nServer: backend\r\n\r\nno",
			http.Header{"Content-Length": {"2"}, "Www-Authenticate": {"Basic"}, "Server": {"backend"}, "Via": {"1.1 Caddy"}},
		},
		{
			"chunked",
			"HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\nRetry-After: 3\r\n\r\n0\r\n\r\n",
			http.Header{"Retry-After": {"3"}, "Server": {"Caddy"}, "Via": {"1.1 Caddy"}},
		},
		{
			"length nominated as of one hop",
			"HTTP/1.1 403 Forbidden\r\nConnection: Content-Length\r\nContent-Length: 2\r\n\r\nno",
			http.Header{"Content-Length": {"2"}, "Server": {"Caddy"}, "Via": {"1.1 Caddy"}},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			res, err := asked(t).Do(&scripted{script: test.script}, testUpstream)
			if err != nil {
				t.Fatal(err)
			}
			h := http.Header{"Server": {"Caddy"}, "Via": {"1.1 Caddy"}}
			res.RelayHeader(h, Down{})
			compareHeader(t, h, test.want)
		})
	}
}

func TestCopyHeader(t *testing.T) {
	dst := http.Header{"Server": {"Caddy"}, "Date": {"now"}, "X-A": {"1"}}
	src := http.Header{"Server": {"a", "b"}, "X-A": {"2"}, "X-B": {"3"}}
	CopyHeader(dst, src)
	compareHeader(t, dst, http.Header{"Server": {"a", "b"}, "Date": {"now"}, "X-A": {"1", "2"}, "X-B": {"3"}})
	dst["X-B"][0] = "changed"
	if src["X-B"][0] != "3" {
		t.Error("dst shares its values with src")
	}
}
