// This file tests what probes ask and which answers pass.

package health

import (
	"context"
	"errors"
	"net"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"
)

func TestAnswers(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	body := func(s string) string { return ok + "\r\n" + s }
	for _, test := range []struct{ name, check, answer, want string }{
		{"ws: true 101", "health_ws", upgrade + "\r\n", ""},
		{"ws: frames at once", "health_ws", upgrade + "\r\n\x81\x05hello", ""},
		{"ws: early hints first", "health_ws", "HTTP/1.1 103 Early Hints\r\n\r\n" + upgrade + "\r\n", ""},
		{"ws: 200", "health_ws", ok + "\r\n", "health_ws: unexpected status 200"},
		{"ws: 503", "health_ws", "HTTP/1.1 503 Service Unavailable\r\n\r\n", "health_ws: unexpected status 503"},
		{"ws: redirect", "health_ws", "HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", "health_ws: unexpected status 302"},
		{"ws: 426 expected", "health_ws {\nexpect_status 426\n}", "HTTP/1.1 426 Upgrade Required\r\n\r\n", ""},
		{"ws: class expected", "health_ws {\nexpect_status 101 2xx\n}", "HTTP/1.1 204 No Content\r\n\r\n", ""},
		{"ws: 101 of several", "health_ws {\nexpect_status 2xx 101\n}", upgrade + "\r\n", ""},
		{"ws: true 101 not expected", "health_ws {\nexpect_status 426\n}", upgrade + "\r\n", "health_ws: unexpected status 101"},
		{"ws: wrong accept", "health_ws", strings.Replace(upgrade, "{accept}", "{accept}x", 1) + "\r\n", "health_ws: backend answered with a wrong Sec-WebSocket-Accept"},
		{"ws: wrong accept, in a range", "health_ws {\nexpect_status 1xx 2xx\n}", strings.Replace(upgrade, "{accept}", "x", 1) + "\r\n", "wrong Sec-WebSocket-Accept"},
		{"ws: 101 without Upgrade", "health_ws", strings.Replace(upgrade, "Upgrade: websocket\r\n", "", 1) + "\r\n", "health_ws: backend answered 101 without upgrading to websocket"},
		{"ws: 101 without Connection", "health_ws", strings.Replace(upgrade, "Connection: Upgrade\r\n", "", 1) + "\r\n", "without upgrading"},
		{"ws: extension nobody asked for", "health_ws", upgrade + "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n", "health_ws: backend's extensions"},
		{"ws: subprotocol nobody asked for", "health_ws", upgrade + "Sec-WebSocket-Protocol: chat\r\n\r\n", "health_ws: backend chose a subprotocol that was not offered"},
		{"ws: subprotocol", "health_ws {\nheader Sec-WebSocket-Protocol chat\nexpect_header Sec-WebSocket-Protocol chat\n}", upgrade + "Sec-WebSocket-Protocol: chat\r\n\r\n", ""},
		{"ws: header", "health_ws {\nexpect_header X-Is a\n}", upgrade + "X-Is: a\r\n\r\n", ""},
		{"ws: another header", "health_ws {\nexpect_header X-Is a\n}", upgrade + "X-Is: b\r\n\r\n", `health_ws: expect_header: unexpected X-Is "b"`},
		{"ws: header of a refusal", "health_ws {\nexpect_status 4xx\nexpect_header X-Is a\n}", "HTTP/1.1 400 Bad Request\r\nX-Is: a\r\n\r\n", ""},
		{"ws: garbage", "health_ws", "\x16\x03\x01\x00\x00garbage\r\n\r\n", "health_ws: reading handshake response"},
		{"ws: nothing", "health_ws", "", "health_ws: reading handshake response"},
		{"ws: half an answer", "health_ws", "HTTP/1.1 101 Switching Protocols\r\nUpgrade", "health_ws: reading handshake response"},
		{"ws: huge header", "health_ws", upgrade + "X: " + strings.Repeat("x", 2<<20) + "\r\n\r\n", "the response header is too long"},

		{"http: 200", "health_http", ok + "\r\n", ""},
		{"http: 399", "health_http", "HTTP/1.1 399 X\r\n\r\n", ""},
		{"http: 400", "health_http", "HTTP/1.1 400 Bad Request\r\n\r\n", "health_http: unexpected status 400"},
		{"http: redirect, which is not followed", "health_http", "HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", ""},
		{"http: redirect not expected", "health_http {\nexpect_status 2xx\n}", "HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", "health_http: unexpected status 302"},
		{"http: range expected", "health_http {\nexpect_status 200-204\n}", "HTTP/1.1 204 No Content\r\n\r\n", ""},
		{"http: beside the range", "health_http {\nexpect_status 200-203\n}", "HTTP/1.1 204 No Content\r\n\r\n", "unexpected status 204"},
		{"http: early hints first", "health_http", "HTTP/1.1 103 Early Hints\r\n\r\n" + ok + "\r\n", ""},
		{"http: HTTP/1.0", "health_http", "HTTP/1.0 200 OK\r\n\r\n", ""},
		{"http: header", "health_http {\nexpect_header x-is\n}", ok + "X-Is:\r\n\r\n", ""},
		{"http: no header", "health_http {\nexpect_header x-is\n}", ok + "\r\n", "health_http: expect_header: no X-Is"},
		{"http: header gone", "health_http {\nexpect_header x-is \"\"\n}", ok + "\r\n", ""},
		{"http: header not gone", "health_http {\nexpect_header x-is \"\"\n}", ok + "X-Is: a\r\n\r\n", `health_http: expect_header: unexpected X-Is "a"`},
		{"http: header by pattern", "health_http {\nexpect_header x-is ~^a+$\n}", ok + "X-Is: aaa\r\n\r\n", ""},
		{"http: all rules", "health_http {\nexpect_header x-is ~a\nexpect_header x-is ~b\nexpect_header y\n}", ok + "X-Is: a\r\nX-Is: b\r\nY: c\r\n\r\n", ""},
		{"http: all but one rule of a field", "health_http {\nexpect_header x-is ~a\nexpect_header x-is ~c\n}", ok + "X-Is: a\r\nX-Is: b\r\n\r\n", `unexpected X-Is "a, b"`},
		{"http: all but one field", "health_http {\nexpect_header x-is a\nexpect_header y\n}", ok + "X-Is: a\r\n\r\n", "no Y"},
		{"http: body", "health_http {\nexpect_body ^ok$\n}", body("ok"), ""},
		{"http: chunked body", "health_http {\nexpect_body ^ok$\n}", ok + "Transfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n", ""},
		{"http: another body", "health_http {\nexpect_body ^ok$\n}", body("not ok"), "health_http: expect_body: no match in 6 bytes"},
		{"http: no body", "health_http {\nexpect_body ok\n}", ok + "Content-Length: 0\r\n\r\n", "expect_body: no match in 0 bytes"},
		{"http: half a body", "health_http {\nexpect_body o\n}", ok + "Content-Length: 5\r\n\r\nok", "health_http: reading body: unexpected EOF"},
		{"http: body and wrong status", "health_http {\nexpect_body ok\n}", "HTTP/1.1 500 X\r\n\r\nok", "unexpected status 500"},
		{"http: match at the limit", "health_http {\nexpect_body end$\n}", body(strings.Repeat("x", maxBody-3) + "end, and more"), ""},
		{"http: match past the limit", "health_http {\nexpect_body end\n}", body(strings.Repeat("x", maxBody-2) + "end"), "no match in 1048576 bytes"},
		{"http: body that does not matter", "health_http", ok + "Content-Length: 5\r\n\r\nok", ""},
		{"http: HEAD", "health_http {\nmethod HEAD\n}", ok + "Content-Length: 5\r\n\r\n", ""},
		{"http: garbage", "health_http", "SSH-2.0-OpenSSH_9.9\r\n", "health_http: HTTP request"},
		{"http: nothing", "health_http", "", "health_http: HTTP request"},
		{"http: huge header", "health_http", ok + "X: " + strings.Repeat("x", 2<<20) + "\r\n\r\n", "health_http: HTTP request"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &backend{script: test.answer}
				start := time.Now()
				compare(t, b.try(t, compiled(t, test.check)), test.want)
				if took := time.Since(start); took != 0 {
					t.Errorf("took %s, want no wait", took)
				}
			})
		})
	}
}

// With both, each can fail alone, and the error names who did.
func TestBothMustPass(t *testing.T) {
	for _, test := range []struct{ ws, http, want string }{
		{upgrade + "\r\n", "HTTP/1.1 200 OK\r\n\r\n", ""},
		{"HTTP/1.1 500 X\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "health_ws: unexpected status 500"},
		{upgrade + "\r\n", "HTTP/1.1 500 X\r\n\r\n", "health_http: unexpected status 500"},
		{"HTTP/1.1 501 X\r\n\r\n", "HTTP/1.1 502 X\r\n\r\n", "health_ws: unexpected status 501; health_http: unexpected status 502"},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := &backend{scripts: map[string]string{"/ws": test.ws, "/http": test.http}}
			err := b.try(t, compiled(t, "health_ws /ws\nhealth_http /http"))
			if test.want == "" && err == nil {
				return
			}
			if err == nil || err.Error() != test.want {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
}

// Two slow ones take as long as one.
func TestBothRunAtOnce(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\n\r\n"
	check := "health_ws /ws {\nexpect_status 200\n}\nhealth_http /http"
	for _, test := range []struct {
		name, ws, http string
		took           time.Duration
		want           string
	}{
		{"both slow", answer, answer, 18 * 100 * time.Millisecond, ""},
		{"both hang", "HTTP/", "HTTP/", Timeout, "; health_http: "},
		{"ws hangs", "HTTP/", answer, Timeout, "health_ws: reading"},
		{"http hangs", answer, "HTTP/", Timeout, "health_http: HTTP request"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &backend{scripts: map[string]string{"/ws": test.ws, "/http": test.http}, slow: 100 * time.Millisecond, stay: true}
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), Timeout)
				defer cancel()
				compare(t, compiled(t, check)(ctx, Target{Dial: b.Dial, Host: "app"}), test.want)
				if took := time.Since(start); took != test.took {
					t.Errorf("took %s, want %s", took, test.took)
				}
				b.running.Wait()
			})
		})
	}
}

// What cannot be a host, like the path of a socket, is localhost.
func TestHost(t *testing.T) {
	for given, want := range map[string]string{"app": "app", "[::1]:80": "[::1]:80", "/run/app.sock": "localhost", "": "localhost"} {
		for _, check := range []string{"health_ws", "health_http"} {
			b := &backend{script: "HTTP/1.1 200 OK\r\n\r\n"}
			_ = compiled(t, check)(t.Context(), Target{Dial: b.Dial, Host: given})
			b.running.Wait()
			if len(b.requests) != 1 || b.requests[0].Host != want {
				t.Errorf("%s of %q: got %v, want Host %q", check, given, b.requests, want)
			}
		}
	}
}

func TestRequest(t *testing.T) {
	t.Setenv("HOLDFAST_TEST", "secret")
	for _, test := range []struct {
		name, check, method, uri, host, port string
		header                               http.Header
	}{
		{"ws", "health_ws", "GET", "/", "app:8080", "", http.Header{"User-Agent": {userAgent}}},
		{"http", "health_http", "GET", "/", "app:8080", "", http.Header{"User-Agent": {userAgent}, "Connection": {"close"}}},
		{
			"ws with everything", "health_ws /a%2Fb?x=1&y=%20 {\nport 81\nheader host example.com\nheader X-A 1\nheader x-a 2\nheader User-Agent me\nheader Origin {env.HOLDFAST_TEST}\nheader X-Other {other}\nheader Sec-WebSocket-Protocol chat\n}",
			"GET", "/a%2Fb?x=1&y=%20", "example.com", "81",
			http.Header{"User-Agent": {"me"}, "X-A": {"1", "2"}, "Origin": {"secret"}, "X-Other": {"{other}"}, "Sec-Websocket-Protocol": {"chat"}},
		},
		{
			"http with everything", "health_http //a%2Fb? {\nmethod POST\nport 81\nheader Host {env.HOLDFAST_TEST}.example.com\nheader X-A \"a {env.HOLDFAST_TEST}\"\n}",
			"POST", "//a%2Fb?", "secret.example.com", "81",
			http.Header{"User-Agent": {userAgent}, "X-A": {"a secret"}, "Connection": {"close"}, "Content-Length": {"0"}},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &backend{script: "HTTP/1.1 200 OK\r\n\r\n"}
				_ = b.try(t, compiled(t, test.check))
				if len(b.requests) != 1 {
					t.Fatalf("got %d requests, want one", len(b.requests))
				}
				r := b.requests[0]
				if r.Method != test.method || r.RequestURI != test.uri || r.Proto != "HTTP/1.1" || r.Host != test.host || b.ports[0] != test.port {
					t.Errorf("got %s %s %s, Host %s, port %q; want %s %s, Host %s, port %q",
						r.Method, r.RequestURI, r.Proto, r.Host, b.ports[0], test.method, test.uri, test.host, test.port)
				}
				if strings.HasPrefix(test.check, "health_ws") {
					if !validKey(r.Header.Get("Sec-Websocket-Key")) {
						t.Errorf("got key %q", r.Header.Get("Sec-Websocket-Key"))
					}
					r.Header.Del("Sec-Websocket-Key")
					test.header["Upgrade"], test.header["Connection"], test.header["Sec-Websocket-Version"] = []string{"websocket"}, []string{"Upgrade"}, []string{"13"}
				}
				if !reflect.DeepEqual(r.Header, test.header) {
					t.Errorf("got header %v, want %v", r.Header, test.header)
				}
			})
		})
	}
}

// A probe whose key is known could be answered without looking at it.
func TestKeysAreFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, p := &backend{script: upgrade + "\r\n"}, compiled(t, "health_ws")
		for range 2 {
			if err := b.try(t, p); err != nil {
				t.Fatal(err)
			}
		}
		if a, b := b.requests[0].Header.Get("Sec-Websocket-Key"), b.requests[1].Header.Get("Sec-Websocket-Key"); a == b {
			t.Errorf("got the key %q twice", a)
		}
	})
}

// What a placeholder stands for is not sent if it would break out of its line, and
// not told either.
func TestPlaceholderThatCannotBeSent(t *testing.T) {
	t.Setenv("HOLDFAST_TEST", "secret\r\nX-Evil: 1")
	for _, check := range []string{
		"health_ws {\nheader X {env.HOLDFAST_TEST}\n}", "health_http {\nheader X {env.HOLDFAST_TEST}\n}",
		"health_ws {\nheader Host {env.HOLDFAST_TEST}\n}", "health_http {\nheader Host {env.HOLDFAST_TEST}\n}",
	} {
		b := new(backend)
		err := b.try(t, compiled(t, check))
		compare(t, err, "cannot be sent")
		if len(b.ports) != 0 || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: got %d dials and %v, want none and no value", check, len(b.ports), err)
		}
	}
}

func TestAcceptedWebSocketIsClosedProperly(t *testing.T) {
	for _, check := range []string{"health_ws", "health_ws {\nexpect_status 2xx\n}", "health_ws {\nexpect_header X-Gone\n}"} {
		synctest.Test(t, func(t *testing.T) {
			b := &backend{script: upgrade + "\r\n"}
			_ = b.try(t, compiled(t, check))
			if len(b.frames) != 1 || !b.masked {
				t.Fatalf("%s: got frames %v, masked %t; want one, masked", check, b.frames, b.masked)
			}
			code, reason := ws.ParseCloseFrameData(b.frames[0].Payload)
			if b.frames[0].Header.OpCode != ws.OpClose || code != ws.StatusNormalClosure || reason != "" {
				t.Errorf("%s: got %v, want a close with 1000", check, b.frames[0])
			}
		})
	}
}

// A backend that has passed need not be quick, or right, at closing.
func TestPartingTakesOneSecondAtMost(t *testing.T) {
	frames := func(conn net.Conn, sent ...ws.Frame) {
		go func() { _, _ = readFrame(conn) }()
		for _, f := range sent {
			if ws.WriteFrame(conn, f) != nil {
				return
			}
		}
	}
	text, closing := ws.NewTextFrame([]byte("hello")), ws.NewCloseFrame(ws.NewCloseFrameBody(ws.StatusNormalClosure, ""))
	for _, test := range []struct {
		name  string
		after func(conn net.Conn)
		took  time.Duration
		early string
	}{
		{"close frame, then open", func(conn net.Conn) { frames(conn, closing); <-time.After(time.Minute) }, 0, ""},
		{"messages, then a close frame", func(conn net.Conn) { frames(conn, text, text, closing); <-time.After(time.Minute) }, 0, ""},
		{"end at once", func(net.Conn) {}, 0, ""},
		{"close frame with the 101", func(conn net.Conn) { frames(conn); <-time.After(time.Minute) }, 0, "\x88\x00"},
		{"a message that began with the 101", func(conn net.Conn) { frames(conn); _, _ = conn.Write([]byte("llo\x88\x00")); <-time.After(time.Minute) }, 0, "\x81\x05he"},
		{"no answer", func(conn net.Conn) { frames(conn); <-time.After(time.Minute) }, closeTimeout, ""},
		{"nothing read", func(net.Conn) { <-time.After(time.Minute) }, closeTimeout, ""},
		{"garbage", func(conn net.Conn) {
			frames(conn)
			_, _ = conn.Write([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
			<-time.After(time.Minute)
		}, 0, ""},
		{"messages for ever", func(conn net.Conn) {
			frames(conn)
			for ws.WriteFrame(conn, text) == nil {
				<-time.After(300 * time.Millisecond)
			}
		}, closeTimeout, ""},
		{"a flood", func(conn net.Conn) {
			frames(conn)
			for large := ws.NewBinaryFrame(make([]byte, 100_000)); ws.WriteFrame(conn, large) == nil; {
			}
		}, 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &backend{script: upgrade + "\r\n" + test.early, after: test.after}
				start := time.Now()
				if err := compiled(t, "health_ws")(t.Context(), Target{Dial: b.Dial, Host: "app"}); err != nil {
					t.Error(err)
				}
				if took := time.Since(start); took != test.took {
					t.Errorf("took %s, want %s", took, test.took)
				}
				b.running.Wait()
			})
		})
	}
}

// The context bounds every stage, and to cancel it ends each at once.
func TestContextEndsAProbe(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	hang := func(ctx context.Context, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	for _, test := range []struct {
		name, check string
		b           *backend
		want        string
	}{
		{"ws: dial", "health_ws", nil, "health_ws: context"},
		{"http: dial", "health_http", nil, "health_http: context"},
		{"ws: silent", "health_ws", &backend{stay: true}, "health_ws: reading handshake response"},
		{"http: silent", "health_http", &backend{stay: true}, "health_http: HTTP request: context"},
		{"ws: header dribbles", "health_ws", &backend{script: upgrade, slow: time.Second / 7}, "health_ws: reading handshake response"},
		{"http: header dribbles", "health_http", &backend{script: ok, slow: time.Second / 3}, "health_http: HTTP request: context"},
		{"ws: header without end", "health_ws", &backend{script: upgrade, stay: true}, "health_ws: reading handshake response"},
		{"http: body without end", "health_http {\nexpect_body x\n}", &backend{script: ok + "\r\nx", stay: true}, "health_http: reading body: context"},
	} {
		for _, canceled := range []bool{false, true} {
			name := test.name + ", timeout"
			if canceled {
				name = test.name + ", canceled"
			}
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ctx, cancel := context.WithTimeout(t.Context(), Timeout)
					defer cancel()
					want := Timeout
					if canceled {
						want = time.Second / 2
						time.AfterFunc(want, cancel)
					}
					dial := hang
					if test.b != nil {
						b := &backend{script: test.b.script, slow: test.b.slow, stay: test.b.stay}
						defer b.running.Wait()
						dial = b.Dial
					}
					start := time.Now()
					compare(t, compiled(t, test.check)(ctx, Target{Dial: dial, Host: "app"}), test.want)
					if took := time.Since(start); took != want {
						t.Errorf("took %s, want %s", took, want)
					}
				})
			})
		}
	}
}

func TestDialErrorFails(t *testing.T) {
	refused := errors.New("dial tcp 192.0.2.1:80: connection refused")
	target := Target{Host: "app", Dial: func(context.Context, string) (net.Conn, error) { return nil, refused }}
	for _, check := range []string{"health_ws", "health_http"} {
		if err := compiled(t, check)(t.Context(), target); !errors.Is(err, refused) || err.Error() != check+": "+refused.Error() {
			t.Errorf("got %v, want the dial's error after %s", err, check)
		}
	}
}
