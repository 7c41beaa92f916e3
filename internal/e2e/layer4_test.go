package e2e

import (
	"testing"

	"github.com/gobwas/ws"
)

// This module brings caddy-l4's listener wrapper with its proxy_protocol handler:
// the client's address is the one of a PROXY header, and a connection without
// one passes, which needs the policy that l4passthrough.go sets. (It runs the
// binary: caddy-l4 v0.1.2 has a data race of its own there, in a debug message.)
func TestProxyProtocolListener(t *testing.T) {
	globals := "servers {\n listener_wrappers {\n layer4 {\n route {\n proxy_protocol\n }\n }\n }\n}"
	p := startBinary(t, globals, "websocket_proxy "+rawBackend(t, echoRaw))
	for header, want := range map[string]string{
		"": "127.0.0.1",
		"PROXY TCP4 203.0.113.7 127.0.0.1 40000 80\r\n": "203.0.113.7",
	} {
		res, c := rawRequest(t, p.addr, header+rawUpgrade(p.addr, ""))
		if res.StatusCode != 101 {
			t.Errorf("PROXY header %q: status %d, want 101", header, res.StatusCode)
			continue
		}
		if got := p.connections(t)[0].Client; got != want {
			t.Errorf("PROXY header %q: client %s, want %s", header, got, want)
		}
		c.send(t, ws.OpText, "hello")
		if _, got, err := c.receive(); err != nil || got != "hello" {
			t.Errorf("PROXY header %q: echo %q, %v", header, got, err)
		}
		c.sendClose(t, 1000, "")
		_, _, _, _ = c.receiveClose()
		p.waitEmpty(t)
	}
}
