// This file tests the backends that the other tests measure with, without a proxy.

package e2e

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// Every kind of backend records what it has read: until it is killed, also if it
// comes back, and after its own close frame until it is answered.
func TestBackendProcesses(t *testing.T) {
	for _, kind := range []string{"coder", "gorilla", "node", "python"} {
		t.Run(kind, func(t *testing.T) {
			b := startBackend(t, kind, "a", "-term-code", "1001")
			c := dialBackend(t, b, "first", "")
			c.send(t, ws.OpText, "one")
			c.send(t, ws.OpBinary, "\x00\xff")
			c.send(t, ws.OpText, "")
			c.send(t, ws.OpPing, "p")
			if h, payload, err := c.receive(); err != nil || h.OpCode != ws.OpPong || payload != "p" {
				t.Fatalf("answer to a ping: got %v %q, %v", h.OpCode, payload, err)
			}
			b.wantTexts(t, "first", "one", "\x00\xff", "")
			kill(t, b)
			if _, _, err := c.receive(); err == nil {
				t.Error("connection to a killed backend: got a frame")
			}

			b.restart(t)
			const resume = "attempt=2, replayed=1, cause=1006"
			c = dialBackend(t, b, "first", "Holdfast-Resume: "+resume+"\r\n")
			c.send(t, ws.OpText, "two")
			var conns []*backendConn
			if !eventually(10*time.Second, func() bool {
				conns = backendConns(t, b)["first"]
				return len(conns) == 2 && len(conns[1].texts) == 1
			}) {
				t.Fatalf("connections: got %v, want two", conns)
			}
			if conns[0].resume != "" || conns[1].resume != resume {
				t.Errorf("resume: got %q and %q, want nothing and %q", conns[0].resume, conns[1].resume, resume)
			}

			b.signal(t, syscall.SIGTERM)
			code, reason, _, err := c.receiveClose()
			if err != nil || code != 1001 || reason != "backend a is stopping" {
				t.Errorf("close after SIGTERM: got %d %q, %v; want 1001", code, reason, err)
			}
			want := []string{"two"}
			for n := range 100 {
				c.send(t, ws.OpText, strconv.Itoa(n))
				want = append(want, strconv.Itoa(n))
			}
			c.send(t, ws.OpPing, "late")
			c.send(t, ws.OpText, "last")
			want = append(want, "last")
			c.sendClose(t, 1001, "")
			_, _ = io.Copy(io.Discard, c.br) // some wait, after a FIN of theirs, for ours
			c.Close()
			if code := b.exit(t); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
			if conns := backendConns(t, b)["first"]; !slices.Equal(conns[1].texts, want) || conns[1].code != 1001 {
				t.Errorf("connection: got %q closed with %d, want %q with 1001", conns[1].texts, conns[1].code, want)
			}
		})
	}
}

// A backend with no connection ends at once, and one that nobody answers, after 5 s.
func TestBackendProcessesEnd(t *testing.T) {
	var all []*backendProcess
	for _, kind := range []string{"coder", "gorilla", "node", "python"} {
		all = append(all, startBackend(t, kind, kind))
	}
	began := time.Now()
	term(t, all...)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("end without a connection: got %v, want it at once, not as with one", took)
	}
	var conns []*rawConn
	for _, b := range all {
		b.restart(t, "-term-code", "1013")
		conns = append(conns, dialBackend(t, b, "x", ""))
	}
	began = time.Now()
	for i, b := range all {
		b.signal(t, syscall.SIGTERM)
		if code, _, _, err := conns[i].receiveClose(); err != nil || code != 1013 {
			t.Errorf("close of %s: got %d, %v; want 1013", b.name, code, err)
		}
	}
	for _, b := range all {
		if code, took := b.exit(t), time.Since(began); code != 0 || took < 4*time.Second {
			t.Errorf("end of %s: got exit code %d after %v, want 0 after 5s", b.name, code, took)
		}
	}
}

// What a request's query selects.
func TestBackendQuery(t *testing.T) {
	for _, kind := range []string{"coder", "gorilla", "node", "python"} {
		t.Run(kind, func(t *testing.T) {
			b := startBackend(t, kind, "a")
			const rate = 20000
			_, c := rawRequest(t, b.addr, strings.Replace(rawUpgrade(b.addr, ""), "x=1", "echo=1&stream="+strconv.Itoa(rate), 1))
			c.send(t, ws.OpText, "hello")
			began, size, echoed := time.Now(), 0, false
			for n := 0; size < rate/2; {
				_, payload, err := c.receive()
				if err != nil {
					t.Fatal(err)
				}
				if payload == "hello" {
					echoed = true
					continue
				}
				if want := fmt.Sprintf("a 1 %d", n); strings.TrimRight(payload, ".") != want {
					t.Fatalf("streamed: got %.40q, want %q", payload, want)
				}
				size += len(payload)
				n++
			}
			if took := time.Since(began); !echoed || took < 300*time.Millisecond {
				t.Errorf("got echo %v, and %d bytes in %v; want an echo and half a second", echoed, size, took)
			}
		})
	}
}

// What flags of the backends in Go select.
func TestBackendFlags(t *testing.T) {
	for _, kind := range []string{"coder", "gorilla"} {
		t.Run(kind, func(t *testing.T) {
			b := startBackend(t, kind, "a", "-poison", "poison", "-subprotocol", "forced", "-answer-pings", "none", "-compress")
			const offer = "Sec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Protocol: one, two\r\n"
			res, c := rawRequest(t, b.addr, rawUpgrade(b.addr, offer))
			if got := res.Header.Get("Sec-WebSocket-Protocol"); got != "forced" {
				t.Errorf("subprotocol: got %q, want forced", got)
			}
			if got := res.Header.Get("Sec-WebSocket-Extensions"); !strings.HasPrefix(got, "permessage-deflate") {
				t.Errorf("extensions: got %q, want permessage-deflate", got)
			}
			b.refuse(t, 404)
			if res, _ := rawRequest(t, b.addr, rawUpgrade(b.addr, "")); res.StatusCode != 404 {
				t.Errorf("status: got %d, want 404", res.StatusCode)
			}
			b.refuse(t, 0)
			if res, _ := rawRequest(t, b.addr, rawUpgrade(b.addr, "")); res.StatusCode != 101 {
				t.Errorf("status: got %d, want 101", res.StatusCode)
			}
			c.send(t, ws.OpPing, "p")
			c.send(t, ws.OpText, "poison")
			if h, payload, err := c.receive(); err == nil {
				t.Errorf("got %v %q, want no pong", h.OpCode, payload)
			}
			if code := b.exit(t); code != 1 {
				t.Errorf("exit code: got %d, want 1", code)
			}
			b.wantTexts(t, "", "poison")
			b.restart(t, "-refuse", "503")
			if res, _ := rawRequest(t, b.addr, rawUpgrade(b.addr, "")); res.StatusCode != 503 {
				t.Errorf("status: got %d, want 503", res.StatusCode)
			}
		})
	}
	t.Run("latest ping", func(t *testing.T) {
		b := startBackend(t, "gorilla", "a", "-answer-pings", "latest", "-pong-delay", "100ms")
		c := dialBackend(t, b, "", "")
		var all []byte // which come together
		for _, payload := range []string{"1", "2", "3"} {
			all = frame.Append(all, ws.OpPing, []byte(payload), true)
		}
		if _, err := c.Write(all); err != nil {
			t.Fatal(err)
		}
		if _, payload, err := c.receive(); err != nil || payload != "3" {
			t.Errorf("pong: got %q, %v; want 3", payload, err)
		}
		c.send(t, ws.OpPing, "4")
		if _, payload, err := c.receive(); err != nil || payload != "4" {
			t.Errorf("pong: got %q, %v; want 4", payload, err)
		}
	})
	t.Run("window bits", func(t *testing.T) {
		b := startBackend(t, "coder", "a", "-compress", "-window-bits", "10")
		res, c := rawRequest(t, b.addr, strings.Replace(rawUpgrade(b.addr, "Sec-WebSocket-Extensions: permessage-deflate\r\n"), "x=1", "echo=1", 1))
		if got := res.Header.Get("Sec-WebSocket-Extensions"); !strings.Contains(got, "server_max_window_bits=10") {
			t.Errorf("extensions: got %q, want server_max_window_bits=10", got)
		}
		c.send(t, ws.OpText, strings.Repeat("a", 5000))
		if h, payload, err := c.receive(); err != nil || h.Rsv != 0 || len(payload) != 5000 {
			t.Errorf("echo: got %+v, %v; want it uncompressed", h, err)
		}
	})
	t.Run("frozen", func(t *testing.T) {
		b := startBackend(t, "coder", "a")
		c := dialBackend(t, b, "f", "")
		b.freeze(t)
		c.send(t, ws.OpText, "while frozen")
		c.send(t, ws.OpPing, "p")
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if _, payload, err := c.receive(); err == nil {
			t.Errorf("answer of a frozen backend: got %q", payload)
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		b.thaw(t)
		if _, payload, err := c.receive(); err != nil || payload != "p" {
			t.Errorf("answer after the thaw: got %q, %v", payload, err)
		}
		b.wantTexts(t, "f", "while frozen")
	})
}

// dialBackend opens a WebSocket to a backend as Holdfast does for a connection; extra
// lines end with CRLF.
func dialBackend(t testing.TB, b *backendProcess, id, extra string) *rawConn {
	t.Helper()
	return rawDial(t, b.addr, "Holdfast-Connection: "+id+"\r\n"+extra)
}

// wantTexts checks what a backend has recorded of the first connection with an id.
func (b *backendProcess) wantTexts(t testing.TB, id string, want ...string) {
	t.Helper()
	var got []string
	if !eventually(10*time.Second, func() bool {
		conns := backendConns(t, b)[id]
		if len(conns) == 0 {
			return false
		}
		got = conns[0].texts
		return slices.Equal(got, want)
	}) {
		t.Errorf("messages that backend %s recorded: got %q, want %q", b.name, got, want)
	}
}
