package e2e

import (
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
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
	backend := rawBackend(t, func(r *http.Request, c *rawConn) {
		if !strings.Contains(r.URL.RawQuery, "flood") {
			echoRaw(r, c)
			return
		}
		if c.accept(r) != nil {
			return
		}
		chunk := ws.MustCompileFrame(ws.NewBinaryFrame(make([]byte, 60<<10)))
		for {
			if _, err := c.Write(chunk); err != nil {
				return
			}
		}
	})
	p := startBinary(t, "connection_registry {\n shutdown_timeout 3s\n}", "websocket_proxy "+backend)

	var readers []*rawConn
	for range quiet {
		readers = append(readers, rawDial(t, p.addr, ""))
	}
	flood := strings.Replace(rawUpgrade(p.addr, ""), "x=1", "flood", 1)
	for i := range late + deaf {
		res, c := rawRequest(t, p.addr, flood)
		if res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("status %d", res.StatusCode)
		}
		if i < late {
			readers = append(readers, c)
		}
	}
	p.waitCount(t, quiet+late+deaf)
	waitStalled(t, &p.proxy, late+deaf)

	began := time.Now()
	path, _ := binary()
	stop := exec.Command(path, "stop", "--address", p.admin)
	if err := stop.Start(); err != nil {
		t.Fatal(err)
	}
	if !eventually(5*time.Second, func() bool { return refusesUpgrades(p.addr) }) {
		t.Error("new upgrades are not refused with 503 while Caddy stops")
	}
	var wg sync.WaitGroup
	for _, c := range readers {
		wg.Go(func() { expectRestart(t, c) })
	}
	select {
	case <-p.exited:
	case <-time.After(shutdownTimeout + 10*time.Second):
		t.Fatal("Caddy does not end")
	}
	if took := time.Since(began); took > shutdownTimeout+time.Second {
		t.Errorf("the stop took %v, want at most %v", took, shutdownTimeout+time.Second)
	}
	wg.Wait()
	if err := stop.Wait(); err != nil {
		t.Errorf("caddy stop: %v", err)
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code: got %d", code)
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
	if status := p.call(t, http.MethodPost, "/stop", nil); status != http.StatusOK {
		t.Errorf("stop: status %d", status)
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

// waitStalled waits until n connections have been sent something, and nothing
// more goes out to any: the clients' and the proxy's buffers are full.
func waitStalled(t *testing.T, p *proxy, n int) {
	t.Helper()
	var last uint64
	if !eventually(30*time.Second, func() bool {
		flooded, sum := 0, uint64(0)
		for _, c := range p.connections(t) {
			if c.BytesOut > 0 {
				flooded++
			}
			sum += c.BytesOut
		}
		still := flooded == n && sum == last
		last = sum
		time.Sleep(200 * time.Millisecond)
		return still
	}) {
		t.Fatal("the flood does not stall")
	}
}
