package e2e

import (
	"fmt"
	"io"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// `caddy stop` with 500 clients, of which 100 do not read what a backend floods
// them with: all that read see 1012, also those that begin to read only then,
// and the process ends within shutdown_timeout and a second.
func TestStopTellsClients(t *testing.T) {
	const quiet, late, deaf = 400, 50, 50
	const shutdownTimeout = 3 * time.Second
	p := startBinary(t, fmt.Sprintf("%sconnection_registry {\n shutdown_timeout %v\n}", logsNotices, shutdownTimeout),
		fmt.Sprintf("websocket_proxy %s\nwebsocket_proxy /flood %s {\n name flooded\n}", rawBackend(t, echoRaw), rawBackend(t, floodRaw)))
	readers := append(p.openAt(t, quiet, "/quiet"), p.openAt(t, late, "/flood")...)
	p.openAt(t, deaf, "/flood")
	p.waitCount(t, quiet+late+deaf)
	p.stalls(t, "flooded", late+deaf)
	report := p.stop(t, func() {
		var all sync.WaitGroup
		for _, c := range readers {
			all.Go(func() { expectRestart(t, c) })
		}
		all.Wait()
	})
	report.wantOver(t, shutdownTimeout)
	if report.Cut < deaf { // their closing handshakes might take longer
		t.Errorf("got %d cut, want at least the %d that do not read", report.Cut, deaf)
	}
}

// A stop also tells the clients of a route that a reload has just removed, with
// everything else of this plugin.
func TestStopAfterLastRouteIsGone(t *testing.T) {
	p := startBinary(t, "", "websocket_proxy "+rawBackend(t, echoRaw))
	c := rawDial(t, p.addr, "")
	p.reload(t, p.siteConfig("", "respond next"))
	if got := p.stats(t).Total; got != 1 {
		t.Fatalf("connections: got %d, want the orphan", got)
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	expectRestart(t, c)
	<-p.exited
}

// refusesUpgrades reports whether a new upgrade gets 503 with Retry-After.
func refusesUpgrades(addr string) bool {
	req, err := http.NewRequest(http.MethodGet, "http://"+addr+"/", nil)
	if err != nil {
		return false
	}
	for name, value := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-Websocket-Version": "13", "Sec-Websocket-Key": testKey,
	} {
		req.Header.Set(name, value)
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return false
	}
	res.Body.Close()
	return res.StatusCode == http.StatusServiceUnavailable && res.Header.Get("Retry-After") != ""
}

// expectRestart reads until the close frame, which must have 1012, and answers it.
func expectRestart(t *testing.T, c *rawConn) {
	for {
		h, err := ws.ReadHeader(c.br)
		if err != nil {
			t.Errorf("reading for the close frame: %v", err)
			return
		}
		if h.OpCode != ws.OpClose {
			if _, err := io.CopyN(io.Discard, c.br, h.Length); err != nil {
				t.Errorf("reading for the close frame: %v", err)
				return
			}
			continue
		}
		payload := make([]byte, h.Length)
		if _, err := io.ReadFull(c.br, payload); err != nil || len(payload) < 2 {
			t.Errorf("close frame: %v %q", err, payload)
			return
		}
		if code := uint16(payload[0])<<8 | uint16(payload[1]); code != 1012 {
			t.Errorf("close code: got %d, want 1012", code)
		}
		c.sendClose(t, 1012, "")
		return
	}
}
