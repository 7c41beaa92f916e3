// This file has Caddy run short of memory and of processors.

package e2e

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// C61, C62, C69: with the collector at work all the time, or one processor, connections
// end late at worst: nothing is left of them, and the sweeps go on and find nothing.
func TestStarvedCaddy(t *testing.T) {
	const workers, visits, residents = 20, 25, 60
	for name, env := range map[string]map[string]string{
		"memory":     {"GOGC": "10", "GOMEMLIMIT": "24MiB"},
		"processors": {"GOMAXPROCS": "1"},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range env {
				t.Setenv(key, value)
			}
			tunnels := freeAddr(t)
			p := startBinary(t, fmt.Sprintf("metrics\nconnection_registry {\n long_lived 200ms\n}\nlayer4 {\n%s {\n%s}\n}", tunnels, toAll(echoBackend(t, nil))),
				"websocket_proxy "+rawBackend(t, echoRaw))
			var stay []*rawConn
			for range residents {
				c := rawDial(t, p.addr, "")
				_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
				stay = append(stay, c)
			}
			if !eventually(20*time.Second, func() bool { return p.stats(t).ByState["open"] == residents }) {
				t.Fatalf("states: got %v, want %d open", p.stats(t).ByState, residents)
			}
			var all sync.WaitGroup
			for worker := range workers {
				random := rand.New(rand.NewPCG(62, uint64(worker)))
				all.Go(func() {
					for range visits {
						rudeClient(t, p.addr, random)
						rudeTunnel(t, tunnels, random)
					}
				})
			}
			// In the middle of it all those that stay are asked to go.
			query := "/connections?window=500ms&kind=websocket&state=open&route=" + url.QueryEscape(p.connections(t)[0].Route) + "&min_age=0"
			if status := p.call(t, http.MethodDelete, query, nil); status != http.StatusAccepted {
				t.Fatalf("DELETE: got status %d", status)
			}
			for _, c := range stay {
				if code, _, _, err := c.receiveClose(); err != nil || code != 1001 {
					t.Errorf("close: got %d, %v", code, err)
				}
				c.sendClose(t, 1001, "")
			}
			all.Wait()
			p.emptyWithin(t, 30*time.Second)
			swept := p.value(t, "caddy_connections_sweep_seconds_count")
			if !eventually(20*time.Second, func() bool { return p.value(t, "caddy_connections_sweep_seconds_count") > swept+1 }) {
				t.Error("the registry is not swept any more")
			}
			if got := p.value(t, "caddy_connections_sweeper_found_total"); got != 0 {
				t.Errorf("sweeper_found_total: got %v, want 0", got)
			}
			var stacks string
			if !eventually(20*time.Second, func() bool {
				_, body := p.request(t, http.MethodGet, "/debug/pprof/goroutine?debug=2")
				stacks = string(body)
				return !strings.Contains(stacks, "internal/session.") && !strings.Contains(stacks, "internal/tunnel.")
			}) {
				t.Errorf("goroutines left:\n%s", stacks)
			}
		})
	}
}

// rudeTunnel gets some way into a tunnel's life and leaves.
func rudeTunnel(t *testing.T, addr string, random *rand.Rand) {
	conn, err := net.DialTimeout("tcp", addr, 20*time.Second)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if random.IntN(2) == 0 {
		_ = conn.(*net.TCPConn).SetLinger(0) // RST
	}
	switch random.IntN(4) {
	case 0: // says nothing
	case 1: // leaves while the backend is being dialed
		_, _ = conn.Write([]byte("hello"))
		pause(random)
	case 2: // leaves in the middle of the echo
		_, _ = conn.Write(make([]byte, random.IntN(100_000)))
		_, _ = conn.Read(make([]byte, 1))
	case 3: // leaves in good order
		_, _ = conn.Write([]byte("hello"))
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	}
}
