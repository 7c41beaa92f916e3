// This file tests tunnels over a network that loses packets.

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// An upstream to which a SYN gets lost is given up; a peer that vanishes is found, be it
// that nobody answers for it, or that it is known to be out of reach.
func TestPassthroughLossyNetwork(t *testing.T) {
	inNamespace(t, func(t *testing.T, far *farHost) {
		bad := far.echoes(t)
		far.silence(t)
		t.Run("lost SYN", func(t *testing.T) { testUnreachable(t, bad, 2*time.Second) })
		far.heal(t)
		t.Run("silence", func(t *testing.T) { testVanished(t, far, far.silence, far.heal) })
		t.Run("unreachable", func(t *testing.T) { testVanished(t, far, far.refuse, far.heal) })
	})
}

// testVanished has the client, or the backend, of tunnels vanish. Each treatment finds
// that by keep-alive, or by tcp_user_timeout if there is something to be sent, and the
// other peer is told by a reset. A tunnel that has neither lives on.
func testVanished(t *testing.T, far *farHost, vanish, heal func(testing.TB)) {
	const found = 4 // of these five
	settings := map[string]string{
		"standard": "keep_alive_treatment standard\n tcp_keepalive 1s 1s 2",
		"extended": "keep_alive_treatment extended\n tcp_keepalive 1s 1s 2",
		"immortal": "keep_alive_treatment immortal\n tcp_keepalive 1s 1s 2",
		"unsent":   "keep_alive_treatment immortal\n tcp_keepalive off\n tcp_user_timeout 2s",
		"patient":  "tcp_keepalive off",
	}
	ended := make(chan error, found+1) // how reading the clients that vanish did
	echoes := func(conn net.Conn) {
		_, err := io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
		ended <- err
	}
	gone := make(chan struct{}) // closed when they have
	vanished := sync.OnceFunc(func() { close(gone) })
	defer vanished()
	near, distant := tcpBackend(t, echoes), far.echoes(t)
	talks := tcpBackend(t, func(conn net.Conn) {
		go func() { <-gone; _, _ = io.WriteString(conn, "anybody there?") }()
		echoes(conn)
	})
	_, port, _ := net.SplitHostPort(freeAddr(t))
	addr := net.JoinHostPort(nearIP, port)
	var routes strings.Builder
	for name, set := range settings {
		backend := near
		if name == "unsent" {
			backend = talks
		}
		routes.WriteString(toSNI(name+".near.test", fmt.Sprintf("%s {\n %s\n}", backend, set)))
		routes.WriteString(toSNI(name+".far.test", fmt.Sprintf("%s {\n %s\n}", distant, set)))
	}
	p := startCaddy(t, fmt.Sprintf("layer4 {\n%s {\n%s}\n}", addr, routes.String()), "respond ok")
	clients := make(map[string]*net.TCPConn) // by the name that they ask for
	for name := range settings {
		clients[name+".near.test"], clients[name+".far.test"] = far.dial(t, addr), dialTCP(t, addr)
	}
	for name, c := range clients {
		hello := clientHello(t, name)
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		wantBytes(t, c, hello)
	}
	before, began := p.stats(t).ClosedByReason["dead"], time.Now()
	vanish(t)
	vanished()
	if _, err := io.WriteString(clients["unsent.far.test"], "anybody there?"); err != nil {
		t.Fatal(err)
	}
	p.waitReason(t, "dead", before, 2*found)
	t.Logf("all were found after %v", time.Since(began))
	for name := range settings {
		if name == "patient" {
			continue
		}
		if n, err := clients[name+".far.test"].Read(make([]byte, 1)); n > 0 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the client got %d bytes, %v; want a reset", name, n, err)
		}
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a backend got %v, want a reset", err)
		}
	}
	if got := p.stats(t).ByState; len(got) != 1 || got["open"] != 2 {
		t.Errorf("states: got %v, want two that are open", got)
	}
	heal(t)
	for name, c := range clients {
		if strings.HasPrefix(name, "patient") {
			wantEcho(t, c, "still there")
		}
		c.Close()
	}
}
