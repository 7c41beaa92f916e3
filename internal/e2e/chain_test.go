// This file tests that what closes one hop of a chain closes all, and the client, and the
// backend (rows C1, C5, C14, C44, C47, C48, C56, C68, C82 and C84 of the seed matrix).

package e2e

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// perLane is how many connections there are of each lane.
const perLane = 3

// end is how the connections of a lane come to their end.
type end struct {
	lane string
	// settings are what the lane takes on, at hops by index, by a reload that ends it.
	settings map[int]string
	// by ends it; nil: its settings do. The clients read, unless it is one of theirs.
	by func(clients []*laneClient)
	// deaf clients do not read, and never close.
	deaf bool
	// want are the reasons at each hop, by index; what is missing is an end that came
	// from another hop, in good order or not.
	want map[int]string
}

// chainEnds are all ends of connections that leave the hops alive. backend ends those of
// the lanes that it is asked to; kill kills the client, or the backend, of a lane.
func chainEnds(t testing.TB, c *chain, backend *laneBackend, kill func(lane string)) []end {
	all := func(reason string) map[int]string {
		want := make(map[int]string)
		for i := range c.hops {
			want[i] = reason
		}
		return want
	}
	each := func(do func(c *laneClient)) func([]*laneClient) {
		return func(clients []*laneClient) {
			for _, c := range clients {
				do(c)
			}
		}
	}
	at := func(lane string, do func(c *net.TCPConn)) func([]*laneClient) {
		return func([]*laneClient) { backend.each(lane, do) }
	}
	killed := func(lane string) func([]*laneClient) { return func([]*laneClient) { kill(lane) } }
	ends := []end{
		{lane: "client-ends", by: each(func(c *laneClient) { _ = c.CloseWrite(); _ = c.tcp.CloseWrite() }), want: all("eof")},
		{lane: "client-closes", by: each(func(c *laneClient) { c.Close() })},
		{lane: "client-resets", by: each(func(c *laneClient) { resetTCP(c.tcp) }), want: all("reset")},
		{lane: "client-killed", by: killed("client-killed")},
		{lane: "backend-ends", by: at("backend-ends", func(c *net.TCPConn) { _ = c.CloseWrite() }), want: all("eof")},
		{lane: "backend-resets", by: at("backend-resets", resetTCP), want: all("reset")},
		{lane: "backend-killed", by: killed("backend-killed")},
	}
	for i, h := range c.hops {
		idle := fmt.Sprint("idle-", i)
		lifetime, admin := fmt.Sprint("lifetime-", i), fmt.Sprint("admin-", i)
		ends = append(ends,
			end{lane: idle, settings: map[int]string{i: idleNow}, want: map[int]string{i: "idle"}},
			end{lane: lifetime, settings: map[int]string{i: "max_lifetime 1ms"}, want: map[int]string{i: "lifetime"}},
			end{lane: admin, want: map[int]string{i: "admin"}, by: func([]*laneClient) {
				for _, c := range h.connections(t) {
					if c.Route == admin {
						h.call(t, http.MethodDelete, "/connections/"+c.ID, nil)
					}
				}
			}},
		)
	}
	// A client that does not hear the end keeps no hop waiting: the one that was told to
	// end, and does not, gets a reset from the next.
	deaf := end{lane: "deaf", deaf: true, settings: map[int]string{len(c.hops) - 1: idleNow}, want: map[int]string{len(c.hops) - 1: "idle"}}
	for i := range len(c.hops) - 1 {
		deaf.want[i] = "reset"
	}
	return append(ends, deaf)
}

const idleNow = "keep_alive_treatment standard\n inactivity_timeout 1ms\n inactivity_grace 0"

// However a connection ends, and wherever, soon no hop has it any more, and each knows
// why; the connections of others go on. Then each hop is killed, and stopped, and comes
// back.
func TestChainCloses(t *testing.T) {
	a := testca.New(t)
	conf := &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "backend", "*.chain.test")}}
	for _, n := range []int{2, 3} {
		t.Run(fmt.Sprint(n, " hops"), func(t *testing.T) {
			backend, mortal := startLaneBackend(t, conf), freeAddr(t)
			processes := map[string]*exec.Cmd{"backend-killed": python(t, pythonEcho, mortal, a.File("backend.crt"), a.File("backend.key"))}
			lanes := []string{"stays"}
			late := make(map[string]map[int]string) // settings, once they are to end what is open
			c := startChain(t, n, func(c *chain, h *hop, i int) string {
				return c.tunnels(h, i, lanes, func(lane string) (string, string) {
					if lane == "backend-killed" {
						return mortal, late[lane][i]
					}
					return backend.addr, late[lane][i]
				})
			})
			ends := chainEnds(t, c, backend, func(lane string) { _ = processes[lane].Process.Kill() })
			for _, e := range ends {
				lanes = append(lanes, e.lane)
			}
			c.reload(t)
			before := c.sockets(t)
			processes["client-killed"] = python(t, pythonTLSClients, c.hops[0].addr, "client-killed.chain.test", fmt.Sprint(perLane))
			stay := c.enterAll(t, "stays", a, false)
			inside := make(map[string][]*laneClient)
			for _, e := range ends {
				if e.lane != "client-killed" {
					inside[e.lane] = c.enterAll(t, e.lane, a, !e.deaf)
				}
				late[e.lane] = e.settings
			}
			for _, lane := range lanes {
				c.waitRoute(t, lane, perLane)
			}
			for _, e := range ends {
				if e.by != nil {
					e.by(inside[e.lane])
				}
			}
			c.reload(t)
			for _, e := range ends {
				c.waitRoute(t, e.lane, 0)
				for _, client := range inside[e.lane] {
					if !e.deaf {
						client.ended(t, e.lane, e.lane == "backend-resets")
					}
				}
				c.wantReasons(t, e)
				if !eventually(closeBound, func() bool { return backend.count(e.lane) == 0 }) {
					t.Errorf("%s: the backend has %d connections left", e.lane, backend.count(e.lane))
				}
			}
			c.waitRoute(t, "stays", perLane)
			for _, client := range stay {
				wantEcho(t, client, "still")
				client.Close()
			}
			for _, client := range inside["deaf"] {
				client.Close()
			}
			c.waitEmpty(t)
			c.waitSockets(t, before)
			c.testLosses(t, a, backend)
		})
	}
}

// Whichever hop's time is over first ends the connection at both, whatever the other has
// set; their keep-alive may differ.
func TestChainTimeoutsDiffer(t *testing.T) {
	const quick = "keep_alive_treatment standard\n inactivity_timeout 1s\n inactivity_grace 0"
	a := testca.New(t)
	backend := startLaneBackend(t, &tls.Config{Certificates: []tls.Certificate{a.Issue(t, "backend", "*.chain.test")}})
	ends := []end{
		{lane: "outer-first", settings: map[int]string{0: quick}, want: map[int]string{0: "idle"}},
		{lane: "inner-first", settings: map[int]string{1: quick}, want: map[int]string{1: "idle"}},
	}
	alive := map[int]string{0: "tcp_keepalive 1s 1s 1", 1: "tcp_keepalive off"}
	late := make(map[string]map[int]string)
	c := startChain(t, 2, func(c *chain, h *hop, i int) string {
		return c.tunnels(h, i, []string{"outer-first", "inner-first", "keep-alive"}, func(lane string) (string, string) {
			if lane == "keep-alive" {
				return backend.addr, alive[i]
			}
			return backend.addr, late[lane][i]
		})
	})
	kept := c.enter(t, "keep-alive", a)
	inside := make(map[string][]*laneClient)
	for _, e := range ends {
		inside[e.lane] = c.enterAll(t, e.lane, a, true)
		late[e.lane] = e.settings
	}
	c.reload(t)
	for _, e := range ends {
		c.waitRoute(t, e.lane, 0)
		for _, client := range inside[e.lane] {
			client.ended(t, e.lane, false)
		}
		c.wantReasons(t, e)
	}
	if !eventually(closeBound, func() bool { all := c.hops[0].connections(t); return len(all) == 1 && all[0].Idle > 3 }) {
		t.Errorf("got %+v, want one that was probed three times", c.hops[0].connections(t))
	}
	wantEcho(t, kept, "still")
	kept.Close()
	c.waitEmpty(t)
}

// testLosses kills each hop, and stops it, with connections. Neither the other hops nor
// the backend keep any, and new ones are served when it is back.
func (c *chain) testLosses(t *testing.T, a *testca.Authority, backend *laneBackend) {
	t.Helper()
	for i, h := range c.hops {
		for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			what := fmt.Sprintf("%v of hop %d", signal, i)
			clients := c.enterAll(t, "stays", a, true)
			c.waitRoute(t, "stays", perLane)
			if err := h.cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			for _, client := range clients {
				client.ended(t, what, false)
			}
			<-h.exited
			c.waitEmpty(t, i)
			if !eventually(closeBound, func() bool { return backend.count("stays") == 0 }) {
				t.Errorf("%s: the backend has %d connections left", what, backend.count("stays"))
			}
			c.start(t, i)
		}
	}
	for _, client := range c.enterAll(t, "stays", a, false) {
		client.Close()
	}
	c.waitEmpty(t)
}

// reload gives each hop the config that it is to have now.
func (c *chain) reload(t testing.TB) {
	t.Helper()
	for i, h := range c.hops {
		h.reload(t, c.config(h, i))
	}
}

// enterAll opens the clients of a lane.
func (c *chain) enterAll(t testing.TB, lane string, a *testca.Authority, read bool) (all []*laneClient) {
	t.Helper()
	for range perLane {
		client := c.enter(t, lane, a)
		if all = append(all, client); read {
			go client.read()
		}
	}
	return all
}

// wantReasons checks why the connections of a lane have ended.
func (c *chain) wantReasons(t testing.TB, e end) {
	t.Helper()
	for i, h := range c.hops {
		got := h.reasons(t, e.lane)
		allowed, total := []string{e.want[i]}, 0
		switch {
		case e.want[i] != "":
		default:
			allowed = []string{"eof", "reset"}
		}
		for reason, n := range got {
			if total += n; !slices.Contains(allowed, reason) {
				total = -1
				break
			}
		}
		if total != perLane {
			t.Errorf("%s at hop %d of %d: closed as %v, want %d as %s", e.lane, i, len(c.hops), got, perLane, strings.Join(allowed, " or "))
		}
	}
}
