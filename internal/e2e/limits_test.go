// This file tests that no limit is ever exceeded and no slot is ever lost, whatever
// clients do.

package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// 1000 clients ask at once, twice: exactly as many as there may be are let in. The
// others are refused before any backend is dialed, and counted by the reason.
func TestLimitsInARush(t *testing.T) {
	const clients, addresses = 1000, 10
	const tooMany, unavailable = http.StatusTooManyRequests, http.StatusServiceUnavailable
	for _, tt := range []struct {
		name, registry, route string
		in                    int // in all
		perIP                 int // of one address; 0: as it comes
		status                int // of all that are refused
		reason                string
	}{
		{"route", "", "max_connections 100", 100, 0, unavailable, "max_connections"},
		{"registry", "max_connections 100", "", 100, 0, unavailable, "max_connections"},
		{"registry, with the route's larger", "max_connections 100", "max_connections 200", 100, 0, unavailable, "max_connections"},
		{"address at the route", "", "max_connections_per_ip 7", 70, 7, tooMany, "max_connections_per_ip"},
		{"address in the registry", "max_connections_per_ip 7", "", 70, 7, tooMany, "max_connections_per_ip"},
		{"address, the smaller of both", "max_connections_per_ip 7", "max_connections_per_ip 5", 50, 5, tooMany, "max_connections_per_ip"},
		// Both limits are reached by the same connection: 429 comes first.
		{"address before route", "", "max_connections 70\n max_connections_per_ip 7", 70, 7, tooMany, "max_connections_per_ip"},
		{"address before registry", "max_connections 70\n max_connections_per_ip 7", "", 70, 7, tooMany, "max_connections_per_ip"},
		{"upstreams", "", "upstream_max_connections 30", 60, 0, unavailable, "no_upstream"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := newTurnstile(t), newTurnstile(t)
			p := startCaddy(t, "metrics\nconnection_registry {\n "+tt.registry+"\n}",
				fmt.Sprintf("websocket_proxy %s %s {\n name rush\n %s\n}", a.addr, b.addr, tt.route))
			for round := range 2 {
				in, refused := p.rush(t, clients, addresses)
				total := 0
				for from, conns := range in {
					total += len(conns)
					if tt.perIP > 0 && len(conns) != tt.perIP {
						t.Errorf("connections of %s: got %d, want %d", from, len(conns), tt.perIP)
					}
				}
				want := map[int]int{tt.status: clients - tt.in}
				if total != tt.in || !maps.Equal(refused, want) {
					t.Errorf("round %d: got %d let in, refused by status %v; want %d, %v", round, total, refused, tt.in, want)
				}
				if got := p.stats(t).Total; got != tt.in {
					t.Errorf("round %d: got %d connections in the registry, want %d", round, got, tt.in)
				}
				dialsA, mostA := a.counts()
				dialsB, mostB := b.counts()
				if dialsA+dialsB != tt.in || mostA != tt.in/2 || mostB != tt.in/2 {
					t.Errorf("round %d: backends were dialed %d and %d times and had %d and %d connections, want half of %d each",
						round, dialsA, dialsB, mostA, mostB, tt.in)
				}
				series := fmt.Sprintf(`caddy_connections_refused_total{kind="websocket",reason=%q,route="rush"}`, tt.reason)
				if got, want := p.value(t, series), float64((round+1)*(clients-tt.in)); got != want {
					t.Errorf("round %d: %s: got %v, want %v", round, series, got, want)
				}
				for _, conns := range in {
					for i, c := range conns {
						if i%4 > 0 {
							c.reset()
						} else {
							c.Close()
						}
					}
				}
				p.waitEmpty(t)
				a.reset(t)
				b.reset(t)
			}
		})
	}
}

// Clients come and go in every way, at every moment: never are more of them in than
// may be, and in the end all slots are there.
func TestLimitsInTurmoil(t *testing.T) {
	const limit, perIP, workers, visits = 20, 6, 60, 40
	for _, tt := range []struct{ name, registry, route string }{
		{"route", "", fmt.Sprintf("max_connections %d\n max_connections_per_ip %d", limit, perIP)},
		{"registry", fmt.Sprintf("max_connections %d\n max_connections_per_ip %d", limit, perIP), ""},
		{"upstreams", "", fmt.Sprintf("upstream_max_connections %d\n max_connections_per_ip %d", limit/2, perIP)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := rawBackend(t, echoRaw), rawBackend(t, echoRaw)
			p := startCaddy(t, "connection_registry {\n "+tt.registry+"\n}", "websocket_proxy "+a+" "+b+" {\n "+tt.route+"\n}")
			var in, most, let, refused atomic.Int64
			var byIP [5]atomic.Int64
			raise := func(n int64) {
				for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
				}
			}
			var wg sync.WaitGroup
			for w := range workers {
				random := rand.New(rand.NewPCG(7, uint64(w)))
				wg.Go(func() {
					for range visits {
						of := random.IntN(len(byIP))
						if random.IntN(4) == 0 {
							rudeClient(t, p.addr, random) // of one more address
							continue
						}
						res, c, err := ask(fmt.Sprint("127.0.0.", 2+of), p.addr, rawUpgrade(p.addr, ""))
						if err != nil {
							t.Error(err)
							return
						}
						if res.StatusCode == http.StatusSwitchingProtocols {
							let.Add(1)
							raise(in.Add(1))
							if n := byIP[of].Add(1); n > perIP {
								t.Errorf("connections of one address: got %d at once, want at most %d", n, perIP)
							}
							pause(random)
							pause(random)
							byIP[of].Add(-1)
							in.Add(-1)
						} else {
							refused.Add(1)
						}
						if random.IntN(4) > 0 {
							c.reset()
						} else {
							c.Close()
						}
					}
				})
			}
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			for open := true; open; {
				select {
				case <-done:
					open = false
				case <-time.After(time.Millisecond):
					by := p.stats(t).ByUpstream
					if by[a]+by[b] > limit {
						t.Errorf("connections: got %v, want at most %d", by, limit)
					}
				}
			}
			t.Logf("%d were let in, %d at once; %d were refused", let.Load(), most.Load(), refused.Load())
			if most.Load() > limit {
				t.Errorf("connections at once: got %d, want at most %d", most.Load(), limit)
			}
			if let.Load() == 0 || refused.Load() == 0 {
				t.Error("want some let in and some refused, for the test to mean something")
			}
			total := 0
			if !eventually(20*time.Second, func() bool { // who has gone may yet have to be heard of
				p.waitEmpty(t)
				full, _ := p.rush(t, 200, len(byIP))
				total = 0
				for _, conns := range full {
					total += len(conns)
					for _, c := range conns {
						c.Close()
					}
				}
				return total >= limit
			}) || total != limit {
				t.Errorf("after all have gone: got %d let in, want %d", total, limit)
			}
		})
	}
}

// Clients whose backend is lost get no more places at the other than there are. The
// rest are held until a place is free.
func TestUpstreamLimitHoldsForResumes(t *testing.T) {
	const limit, clients = 30, 40
	stays, dies := newTurnstile(t), startBackend(t, "coder", "dies")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n upstream_max_connections %d\n resume_interval 1ms 50ms\n resume_timeout 1m\n}",
		stays.addr, dies.addr, limit))
	in, _ := p.rush(t, clients, 4)
	kill(t, dies)
	wants := func(open, held int) {
		t.Helper()
		var s stats
		if !eventually(20*time.Second, func() bool {
			s = p.stats(t)
			return s.ByState["open"] == open && s.ByState["held"] == held && s.ByUpstream[stays.addr] == open
		}) {
			t.Errorf("connections: got %+v, want %d open and %d held", s, open, held)
		}
	}
	wants(limit, clients-limit)
	if dials, most := stays.counts(); dials != limit || most != limit {
		t.Errorf("the backend that stays: got %d dials and %d connections at once, want %d", dials, most, limit)
	}
	gone := 0
	for _, c := range p.connections(t) {
		if c.Upstream == stays.addr && gone < 4 {
			p.call(t, http.MethodDelete, "/connections/"+c.ID, nil)
			gone++
		}
	}
	wants(limit, clients-limit-gone)
	dies.restart(t)
	if !eventually(20*time.Second, func() bool { return p.stats(t).ByState["open"] == clients-gone }) {
		t.Errorf("connections: got %+v, want all %d open", p.stats(t), clients-gone)
	}
	for _, conns := range in {
		for _, c := range conns {
			c.Close()
		}
	}
}

// Processes with connections, open or being opened, are killed: their slots are free
// again.
func TestLimitsAfterKilledClients(t *testing.T) {
	const limit, processes = 60, 4
	hold := make(chan struct{})
	backend := newCountedBackend(t, func(r *http.Request, c *rawConn) {
		if r.URL.Path == "/slow" {
			<-hold
			return
		}
		echoRaw(r, c)
	})
	defer close(hold)
	p := startCaddy(t, "connection_registry {\n max_connections_per_ip 60\n}",
		fmt.Sprintf("websocket_proxy %s {\n max_connections %d\n upstream_max_connections %d\n handshake_timeout 1m\n}", backend.addr, limit, limit))
	for _, path := range []string{"/open", "/slow"} {
		t.Run(path, func(t *testing.T) {
			var clients []*exec.Cmd
			for range processes {
				cmd := exec.Command(tool(t, "/usr/bin/python3"), "-c", pythonClients, p.addr, fmt.Sprint(limit/processes), pathed(p.addr, path, ""))
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				clients = append(clients, cmd)
			}
			defer func() {
				for _, cmd := range clients {
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
				}
			}()
			state := map[string]string{"/open": "open", "/slow": "connecting"}[path]
			if !eventually(20*time.Second, func() bool { return p.stats(t).ByState[state] == limit }) {
				t.Fatalf("connections: got %v, want %d %s", p.stats(t).ByState, limit, state)
			}
			p.refusedWith(t, http.StatusTooManyRequests, "")
			for n, cmd := range clients {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				_ = cmd.Wait()
				p.waitCount(t, limit-limit/processes*(n+1))
			}
			in, refused := p.rush(t, 2*limit, 1)
			if got := len(in["127.0.0.2"]); got != limit || refused[http.StatusTooManyRequests] != limit {
				t.Errorf("after the kill: got %d let in, refused by status %v; want %d of each", got, refused, limit)
			}
			for _, c := range in["127.0.0.2"] {
				c.Close()
			}
			p.waitEmpty(t)
		})
	}
}

// pythonClients makes connections, sends a request on each, and keeps them.
const pythonClients = `
import socket, sys, time
host, _, port = sys.argv[1].rpartition(":")
socks = [socket.create_connection((host, int(port))) for _ in range(int(sys.argv[2]))]
for s in socks:
    s.sendall(sys.argv[3].encode())
time.sleep(600)
`
