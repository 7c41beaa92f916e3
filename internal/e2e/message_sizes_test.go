// This file tests client_max_message_size and server_max_message_size.

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// A message as large as its sender's limit arrives; of a larger one nothing does after
// the frame that makes it too large. Sizes are those on the wire, over all fragments.
func TestMessageSizes(t *testing.T) {
	const limit = 1 << 10
	const pmd = "Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover\r\n"
	noise := make([]byte, 3*limit)
	random := rand.New(rand.NewPCG(1, 1))
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	x := func(n int) string { return strings.Repeat("x", n) }
	type part struct {
		first   byte
		payload string
	}
	tests := []struct {
		name    string
		parts   []part
		arrives int // so many of the parts
	}{
		{"below", []part{{fin | text, x(limit - 1)}}, 1},
		{"at", []part{{fin | text, x(limit)}, {fin | binaryOp, x(limit)}}, 2},
		{"above", []part{{fin | text, x(limit + 1)}}, 0},
		{"far above", []part{{fin | binaryOp, x(1 << 20)}}, 0},
		{"above, after some that are not", []part{{fin | text, x(limit)}, {fin | text, ""}, {fin | text, x(limit)}, {fin | text, x(limit + 1)}}, 3},
		{"fragments at", []part{{text, x(1000)}, {more, ""}, {fin | pingOp, "between"}, {more, x(23)}, {fin | more, x(1)}}, 5},
		{"fragments above", []part{{text, x(1000)}, {fin | pingOp, "between"}, {more, x(24)}, {fin | more, x(1)}}, 3},
		{"compressed, and larger than the limit only when it is read", []part{{fin | rsv1 | text, deflated(t, x(100*limit))}}, 1},
		{"compressed, and larger than the limit", []part{{fin | rsv1 | binaryOp, deflated(t, string(noise))}}, 0},
		{"compressed, in fragments", []part{{rsv1 | binaryOp, deflated(t, string(noise))[:limit]}, {fin | more, deflated(t, string(noise))[limit:]}}, 1},
	}
	for _, side := range []struct {
		setting, other string
		backend        uint16 // the code that it gets
	}{
		{"client_max_message_size", "server_max_message_size", 1001},
		{"server_max_message_size", "client_max_message_size", 1009},
	} {
		t.Run(side.setting, func(t *testing.T) {
			p := startPairing(t, "", side.setting+" 1KiB\n"+side.other+" 10")
			for _, tt := range tests {
				t.Run(tt.name, func(t *testing.T) {
					l := p.openBy(t, rawUpgrade(p.addr, pmd), pmd)
					p.only(t)
					before := p.stats(t)
					from, to := l.client, l.backend
					if side.setting == "server_max_message_size" {
						from, to = to, from
					}
					var wire []byte
					for _, part := range tt.parts {
						wire = append(wire, wireFrame(part.first, part.payload, from.client, 0)...)
					}
					sent := make(chan error, 1)
					go func() { _, err := from.Write(wire); sent <- err }() // it may not be read to its end
					for i, part := range tt.parts[:tt.arrives] {
						if h, got, err := to.receive(); err != nil || got != part.payload {
							t.Fatalf("part %d: got %v of %d bytes, %v; want %d", i, h.OpCode, len(got), err, len(part.payload))
						}
					}
					if tt.arrives == len(tt.parts) {
						from.sendClose(t, 1000, "")
						to.hears(t, "the other", says{1000, ""})
						to.sendClose(t, 1000, "")
						from.hears(t, "the sender", says{1000, ""})
						from.Close()
						to.Close()
						p.emptyWithin(t, 2*time.Second)
						if got := p.stats(t).ClosedByReason["too_big"]; got != before.ClosedByReason["too_big"] {
							t.Error("it ended as too_big")
						}
						return
					}
					l.client.hears(t, "client", says{1009, "message too big"})
					l.client.Close()
					if code, _, _, err := l.backend.receiveClose(); err != nil || code != side.backend {
						t.Errorf("backend: got %d, %v; want %d", code, err, side.backend)
					}
					l.backend.Close()
					<-sent
					p.ended(t, before, "too_big", 3*time.Second)
				})
			}
		})
	}
}

// A limit that a reload sets counts for live connections, from the next message on.
func TestReloadChangesMessageSizes(t *testing.T) {
	backend := rawBackend(t, echoRaw)
	site := func(limits string) string { return "websocket_proxy " + backend + " {\n" + limits + "\n}" }
	p := startCaddy(t, "", site("client_max_message_size 0\nserver_max_message_size 0"))
	c := rawDial(t, p.addr, "")
	big := strings.Repeat("x", 10_000) // too little to be forwarded in parts
	c.send(t, ws.OpText, big)
	c.wantText(t, big)
	p.reload(t, p.siteConfig("", site("client_max_message_size 9KB")))
	c.send(t, ws.OpText, "small")
	c.wantText(t, "small")
	c.send(t, ws.OpText, big)
	c.hears(t, "client", says{1009, "message too big"})
	c.Close()
	p.waitEmpty(t)
}

// A backend that is lost changes no limit: a message that is too big ends the client,
// also if it arrives while there is no backend.
func TestMessageSizeWhileHeld(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p := &pairing{startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n client_max_message_size 100\n resume_interval 20s\n}", ln.Addr())), ln}
	before := p.stats(t)
	l := p.openBy(t, rawUpgrade(p.addr, ""))
	c := p.only(t)
	ln.Close()
	l.backend.reset()
	p.waitState(t, c.ID, "held", "")
	l.client.send(t, ws.OpText, strings.Repeat("x", 100))
	if _, err := l.client.Write(frame.Append(nil, ws.OpText, []byte(strings.Repeat("x", 101)), true)); err != nil {
		t.Fatal(err)
	}
	l.client.hears(t, "client", says{1009, "message too big"})
	l.client.Close()
	p.ended(t, before, "too_big", 3*time.Second)
}
