package e2e

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// This file tests what both peers get when either ends the connection, in good
// order or not, and that soon nothing is left of it.

// soon is how long the end of a connection may take: a second, also if a peer does not
// answer, on a machine that is not busy. It is less than the five seconds after which a
// connection that does not end is cut.
const soon = 4 * time.Second

// says is a close frame as a peer sends or gets it. The zero value is none.
type says struct {
	code   uint16 // frame.NoStatus: an empty close frame
	reason string
}

// hears reads until the end of the connection and checks that it had one close
// frame, or none, and nothing else.
func (c *rawConn) hears(t testing.TB, who string, want says) {
	t.Helper()
	code, reason, before, err := c.receiveClose()
	if got := (says{code, reason}); got != want || len(before) > 0 || err != nil && want.code != 0 {
		t.Errorf("%s: got %+v after %q, %v; want %+v", who, got, before, err, want)
	}
}

// reset breaks the connection.
func (c *rawConn) reset() {
	_ = c.tcp().SetLinger(0)
	c.Close()
}

// Close frames are passed on as they are, and so is the answer.
func TestCloseFrames(t *testing.T) {
	p := startPairing(t, "", "")
	for _, tt := range []struct {
		name         string
		first, reply says
	}{
		{"code and reason", says{1000, "bye"}, says{1000, "bye"}},
		{"another answer", says{1000, "bye"}, says{1000, ""}},
		{"another code in the answer", says{4001, "moved"}, says{1000, "ok"}},
		{"empty", says{frame.NoStatus, ""}, says{frame.NoStatus, ""}},
		{"longest reason", says{3000, strings.Repeat("\u00e4", 61) + "."}, says{3000, ""}},
		{"error", says{1011, "oops"}, says{1011, ""}},
	} {
		check := func(t *testing.T, reason string, first, second *rawConn) {
			before := p.stats(t)
			first.sendClose(t, tt.first.code, tt.first.reason)
			second.hears(t, "the other", tt.first)
			second.sendClose(t, tt.reply.code, tt.reply.reason)
			first.hears(t, "the one that closed", tt.reply)
			first.tcp().CloseWrite()
			second.tcp().CloseWrite()
			first.leave(t)
			second.leave(t)
			p.ended(t, before, reason, soon)
		}
		t.Run("client/"+tt.name, func(t *testing.T) {
			l := p.open(t, "")
			check(t, "client_closed", l.client, l.backend)
		})
		t.Run("backend/"+tt.name, func(t *testing.T) {
			l := p.open(t, "")
			check(t, "backend_closed", l.backend, l.client)
		})
	}
}

// Both close at once: each gets the other's frame as the answer to its own.
func TestCloseFramesCross(t *testing.T) {
	p := startPairing(t, "", "")
	for range 20 {
		before := p.stats(t)
		l := p.open(t, "")
		l.client.sendClose(t, 4001, "client")
		l.backend.sendClose(t, 4002, "backend")
		l.client.hears(t, "client", says{4002, "backend"})
		l.backend.hears(t, "backend", says{4001, "client"})
		l.client.Close()
		l.backend.Close()
		p.emptyWithin(t, soon)
		after := p.stats(t).ClosedByReason
		if n := after["client_closed"] + after["backend_closed"] - before.ClosedByReason["client_closed"] - before.ClosedByReason["backend_closed"]; n != 1 {
			t.Errorf("reasons: got %v after %v, want one closed more", after, before.ClosedByReason)
		}
	}
}

// A peer that goes without a close frame: the other is told, and soon all is free.
func TestPeerGone(t *testing.T) {
	p := startPairing(t, "", "")
	half := func(c *rawConn) { _ = c.tcp().CloseWrite() }
	tests := []struct {
		name            string
		goes            func(c *rawConn)
		partial, inside bool // after a part of a frame, or inside a fragmented message
	}{
		{"FIN", func(c *rawConn) { c.Close() }, false, false},
		{"FIN of one direction", half, false, false},
		{"RST", (*rawConn).reset, false, false},
		{"FIN inside a frame", half, true, false},
		{"RST inside a frame", (*rawConn).reset, true, false},
		{"FIN inside a message", half, false, true},
	}
	for _, tt := range tests {
		check := func(t *testing.T, gone, other *rawConn, reason string, want says) {
			before := p.stats(t)
			gone.send(t, ws.OpText, "last words")
			if _, got, err := other.receive(); err != nil || got != "last words" {
				t.Fatalf("got %q, %v", got, err)
			}
			if tt.partial {
				_, _ = gone.Write(wireFrame(fin|text, "not all of this", gone.client, 0)[:8])
			}
			if tt.inside {
				_, _ = gone.Write(wireFrame(text, "part", gone.client, 0))
				if h, got, err := other.receive(); err != nil || h.Fin || got != "part" {
					t.Fatalf("got %q, %v", got, err)
				}
			}
			tt.goes(gone)
			other.hears(t, "the other", want)
			other.sendClose(t, want.code, "")
			_ = other.tcp().CloseWrite()
			other.leave(t)
			p.ended(t, before, reason, soon)
			if tt.name == "FIN of one direction" {
				gone.hears(t, "the one that left", says{})
			}
		}
		t.Run("client/"+tt.name, func(t *testing.T) {
			l := p.open(t, "")
			check(t, l.client, l.backend, "client_gone", says{1001, ""})
		})
		t.Run("backend/"+tt.name, func(t *testing.T) {
			l := p.open(t, "")
			check(t, l.backend, l.client, "backend_lost", says{1014, "backend connection lost"})
		})
	}
}

// A peer that does not answer a close frame is waited for a second, no longer,
// and the one that closed gets its own code for an answer.
func TestCloseUnanswered(t *testing.T) {
	p := startPairing(t, "", "")
	check := func(t *testing.T, reason string, closes, mute *rawConn) {
		before := p.stats(t)
		closes.sendClose(t, 4003, "enough")
		mute.hears(t, "the one that is mute", says{4003, "enough"})
		code, _, _, err := closes.receiveClose()
		if err != nil || code != 4003 {
			t.Errorf("the one that closed: got %d, %v; want its own 4003", code, err)
		}
		closes.Close()
		p.ended(t, before, reason, soon)
	}
	t.Run("client", func(t *testing.T) {
		l := p.open(t, "")
		check(t, "backend_closed", l.backend, l.client)
	})
	t.Run("backend", func(t *testing.T) {
		l := p.open(t, "")
		check(t, "client_closed", l.client, l.backend)
	})
	t.Run("backend, and the client does not close", func(t *testing.T) {
		l := p.open(t, "")
		before := p.stats(t)
		l.client.sendClose(t, 1000, "")
		p.ended(t, before, "client_closed", soon)
	})
	t.Run("client that is gone, and the backend does nothing", func(t *testing.T) {
		l := p.open(t, "")
		before := p.stats(t)
		l.client.Close()
		p.ended(t, before, "client_gone", soon)
	})
	t.Run("backend that is lost, and the client does nothing", func(t *testing.T) {
		l := p.open(t, "")
		before := p.stats(t)
		l.backend.Close()
		p.ended(t, before, "backend_lost", soon)
	})
}

// A backend says all that it has, closes and is gone, while the client takes its
// time: the client gets everything, and the backend's code.
func TestSlowClientGetsAll(t *testing.T) {
	const size = 16 << 20
	message := strings.Repeat("0123456789abcdef", size/16)
	for _, tt := range []struct {
		name string
		bye  []byte
		want uint16
	}{
		{"close frame", frame.AppendClose(nil, 4004, "done", false), 4004},
		{"no close frame", nil, 1014},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startPairing(t, "", "")
			before := p.stats(t)
			l := p.open(t, "")
			_ = l.client.tcp().SetReadBuffer(64 << 10)
			_, _ = l.client.SetDeadline(time.Now().Add(time.Minute)), l.backend.SetDeadline(time.Now().Add(time.Minute))
			sent := make(chan error, 1)
			go sendAndLeave(l.backend, append(wireFrame(fin|binaryOp, message, false, 0), tt.bye...), sent)
			got, messages := 0, 0
			for {
				h, payload, err := l.client.receive()
				if err != nil {
					t.Fatalf("after %d bytes: %v", got, err)
				}
				if h.OpCode == ws.OpClose {
					if code := uint16(payload[0])<<8 | uint16(payload[1]); code != tt.want {
						t.Errorf("close: got %d, want %d", code, tt.want)
					}
					break
				}
				if payload != message[got:got+len(payload)] {
					t.Fatalf("the bytes from %d on are not what was sent", got)
				}
				if got += len(payload); h.Fin {
					messages++
				}
				pass(4 * time.Millisecond)
			}
			if got != size || messages != 1 {
				t.Errorf("got %d bytes in %d messages, want %d in one", got, messages, size)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
			l.client.sendClose(t, tt.want, "")
			l.client.Close()
			p.ended(t, before, map[uint16]string{4004: "backend_closed", 1014: "backend_lost"}[tt.want], soon)
		})
	}
}

// sendAndLeave writes and closes at once. It ends when all is with the kernel.
func sendAndLeave(c *rawConn, all []byte, sent chan<- error) {
	_, err := c.Write(all)
	c.Close()
	sent <- err
}

// The admin API ends a connection.
func TestAdminCloses(t *testing.T) {
	p := startPairing(t, "", "")
	for _, tt := range []struct {
		query string
		want  says
	}{
		{"?code=4000&reason=moved", says{4000, "moved"}},
		{"?code=1012", says{1012, ""}},
		{"?reason=why%20not", says{1001, "why not"}},
		{"", says{1001, ""}},
	} {
		t.Run(tt.query, func(t *testing.T) {
			before := p.stats(t)
			l := p.open(t, "")
			if status := p.call(t, http.MethodDelete, "/connections/"+p.only(t).ID+tt.query, nil); status != http.StatusNoContent {
				t.Errorf("status: got %d, want 204", status)
			}
			l.client.hears(t, "client", tt.want)
			l.backend.hears(t, "backend", says{1001, ""})
			l.client.sendClose(t, tt.want.code, "")
			l.backend.sendClose(t, 1001, "")
			_ = l.client.tcp().CloseWrite()
			_ = l.backend.tcp().CloseWrite()
			l.client.leave(t)
			l.backend.leave(t)
			p.ended(t, before, "admin", soon)
		})
	}
}

// A connection may be ended as soon as its client has its 101.
func TestAdminClosesAtOnce(t *testing.T) {
	p := startPairing(t, "", "")
	for range 50 {
		l := p.open(t, "")
		id := l.request.Header.Get("Holdfast-Connection")
		if status := p.call(t, http.MethodDelete, "/connections/"+id+"?code=4000&reason=moved", nil); status != http.StatusNoContent {
			t.Errorf("status: got %d, want 204", status)
		}
		l.client.hears(t, "client", says{4000, "moved"})
		l.backend.hears(t, "backend", says{1001, ""})
		l.client.Close()
		l.backend.Close()
	}
	p.emptyWithin(t, soon)
}
