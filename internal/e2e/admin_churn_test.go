// This file asks the admin API while connections come and go.

package e2e

import (
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// The API answers while many connections come and go, in good order and by a reset, and a
// listing by pages shows each one that lives through it once.
func TestAPIUnderChurn(t *testing.T) {
	const stay, parallel = 200, 10
	churn := long2(500, 2000)
	backend, tunnels := rawBackend(t, echoRaw), freeAddr(t)
	p := startCaddy(t, "metrics\nlayer4 {\n"+tunnels+" {\n"+toAll(echoBackend(t, nil)+" {\n name tunnels\n}")+"}\n}",
		"websocket_proxy "+backend+" {\n name chat\n}")
	for i := range stay {
		if i%4 == 0 {
			dialTCP(t, tunnels)
		} else {
			_ = rawDial(t, p.addr, "").SetDeadline(time.Now().Add(time.Minute))
		}
	}
	p.waitCount(t, stay)
	stays := make(map[string]bool)
	for _, c := range p.connections(t) {
		stays[c.ID] = true
	}

	var left atomic.Int32
	left.Store(int32(churn))
	var visitors sync.WaitGroup
	for range parallel {
		visitors.Go(func() {
			for n := left.Add(-1); n >= 0; n = left.Add(-1) {
				visitBriefly(t, p.addr, tunnels, int(n))
			}
		})
	}
	// One more listing is through when they all are, with something to list.
	for listings := 0; left.Load() > 0 || listings == 0; listings++ {
		wantListed(t, p, stays)
		for _, path := range []string{"/connections/stats", "/connections/upstreams", "/connections?state=closing", "/metrics"} {
			if status, body := p.request(t, http.MethodGet, path); status != http.StatusOK {
				t.Errorf("%s: got %d %s", path, status, body)
			}
		}
	}
	visitors.Wait()
	p.waitCount(t, stay)
	wantListed(t, p, stays)
	if status := p.call(t, http.MethodDelete, "/connections?min_age=0&kind=passthrough&window=0", nil); status != http.StatusAccepted {
		t.Errorf("ending the tunnels: got status %d", status)
	}
	if status := p.call(t, http.MethodDelete, "/connections?route=chat&window=100ms", nil); status != http.StatusAccepted {
		t.Errorf("ending the rest: got status %d", status)
	}
}

// visitBriefly opens a connection of either kind, lets it echo, and ends it.
func visitBriefly(t *testing.T, site, tunnels string, n int) {
	if n%4 == 0 {
		c := dialTCP(t, tunnels)
		wantEcho(t, c, "hello")
		c.Close()
		return
	}
	c := rawDial(t, site, "")
	c.send(t, ws.OpText, "hello")
	c.wantText(t, "hello")
	if n%4 == 1 {
		c.sendClose(t, 1000, "")
		_, _, _, _ = c.receiveClose()
	}
	c.Close()
}

// wantListed checks that a listing by pages has each of these connections once, and all
// in order of age.
func wantListed(t *testing.T, p *proxy, stays map[string]bool) {
	t.Helper()
	seen := make(map[string]bool)
	query, last := "?limit=30", ""
	for {
		var page struct {
			Connections []connection
			Next        string
		}
		if status := p.call(t, http.MethodGet, "/connections"+query, &page); status != http.StatusOK {
			t.Fatalf("%s: got status %d", query, status)
		}
		for _, c := range page.Connections {
			if c.ID <= last {
				t.Errorf("got %s after %s, want order of age, each once", c.ID, last)
			}
			last = c.ID
			seen[c.ID] = true
		}
		if page.Next == "" {
			break
		}
		query = "?limit=30&after=" + page.Next
	}
	for id := range stays {
		if !seen[id] {
			t.Errorf("got a listing without %s, which lived through it", id)
		}
	}
}
