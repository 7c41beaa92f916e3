// This file has clients say their last word to a backend that never reads it.

package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// A backend that is a real process hangs and is killed with what a client sent before it
// closed: another one gets that, and the client's close frame behind it, or under strict
// the client is told.
func TestBackendKilledWithTheLastWord(t *testing.T) {
	for _, test := range []struct {
		mode   string
		code   uint16
		reason string
		kept   bool
	}{
		{"unacked", 1000, "done", true},
		{"strict", 1012, "delivery of a message is in doubt", false},
	} {
		t.Run(test.mode, func(t *testing.T) {
			a, b := startBackend(t, "gorilla", "a"), startBackend(t, "node", "b")
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy first\n resume_interval 10ms 100ms\n replay %s\n}", a.addr, b.addr, test.mode))
			c := rawDial(t, p.addr, "")
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			id := p.connections(t)[0].ID
			a.freeze(t)
			want := []string{"one", "two"}
			for _, m := range want {
				c.send(t, 1, m)
			}
			c.sendClose(t, 1000, "done")
			if !eventually(10*time.Second, func() bool {
				all := p.connections(t)
				return len(all) == 0 || all[0].MessagesIn == uint64(len(want))
			}) {
				t.Fatal("the proxy has not read the messages")
			}
			kill(t, a)
			code, reason, _, err := c.receiveClose()
			if err != nil || code != test.code || reason != test.reason {
				t.Errorf("the client was told %d %q, %v, want %d %q", code, reason, err, test.code, test.reason)
			}
			p.waitCount(t, 0)
			if !test.kept {
				return
			}
			var conns []*backendConn
			if !eventually(10*time.Second, func() bool {
				conns = backendConns(t, b)[id]
				return len(conns) == 1 && conns[0].code == 1000 && slices.Equal(conns[0].texts, want)
			}) {
				t.Errorf("connections of the next backend: got %v, want one that the client has closed", conns)
			}
		})
	}
}
