package e2e

import (
	"testing"

	"github.com/gobwas/ws"
)

// The main job: a message goes to a backend and comes back, the registry shows
// the connection, and a close frame is echoed by the backend.
func TestEcho(t *testing.T) {
	backend := rawBackend(t, echoRaw)
	p := startCaddy(t, "", "websocket_proxy "+backend)

	c := rawDial(t, p.addr, "")
	c.send(t, ws.OpText, "hello")
	if h, payload, err := c.receive(); err != nil || h.OpCode != ws.OpText || payload != "hello" {
		t.Fatalf("got %v %q, %v", h.OpCode, payload, err)
	}
	list := p.connections(t)
	if len(list) != 1 {
		t.Fatalf("connections: got %d, want 1", len(list))
	}
	got := list[0]
	if got.State != "open" || got.Upstream != backend || got.Client != "127.0.0.1" || got.URI != "/chat?x=1" || got.Kind != "websocket" {
		t.Errorf("connection: got %+v", got)
	}
	if got.MessagesIn != 1 || got.MessagesOut != 1 || got.BytesIn != 5 || got.BytesOut != 5 {
		t.Errorf("counts: got %+v", got)
	}
	c.sendClose(t, 1000, "bye")
	if code, reason, _, err := c.receiveClose(); err != nil || code != 1000 || reason != "bye" {
		t.Errorf("close: got %d %q, %v; want the backend's echo of 1000 bye", code, reason, err)
	}
}
