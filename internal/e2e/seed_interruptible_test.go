// This file tests what is left of table "I: Interruptible WebSocket Proxy" of the seed
// matrix. Which test proves which row:
//
//	I1   minor network interruptions: TestI1NetworkInterruptions; scaling: TestI8…; load
//	     balancing: TestPolicies; deployments: TestBlueGreen, TestResumeAfterClose;
//	     quick restarts: TestResumeAfterKill, TestMetricsOfResumes
//	I2   TestMigrateBackAndForth, TestResumedRequest, TestI10…
//	I3   TestI10…, TestResumeHeader; without one that refuses: TestRefusalsThatDoNot,
//	     TestNextUpstream; with health checks: rows E11 to E14
//	I4   TestI4QueueComesFirst; torn messages: TestBackendDiesReading; in fake time
//	     session.TestMessagesKeptWhileHeldComeInOrderAlsoIfTheBackendSpeaksFirst
//	I5   TestI5IdleConnectionsKeepNothing; resident memory: TestIdleMemory; the default
//	     of 5 MiB: TestAdaptGood
//	I6   TestI6OverflowAndI7Memory; in fake time session.TestPauseLosesNothing and
//	     session.TestOverflowEndsAClientOnlyWhileItIsHeld
//	I7   TestI6OverflowAndI7Memory, session.TestSessionsShareTheReplayMemory;
//	     max_connections is no setting yet: row C23
//	I8   TestI8UpstreamsComeAndGoByTheConfigAPI; by reloads: TestBlueGreen,
//	     TestDrainWindowZero, TestReloadBringsUpstreamBack, TestReloadThatFailsMovesNobody
//	I10  TestI10ConnectionsHaveNamesOfTheirOwn, TestMigrate; all headers: TestResumedRequest

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// station is a backend that says its name first, before it reads, and then sends back
// what it gets. At "leave" it closes with 1012.
type station struct {
	name, addr string
	requests   chan *http.Request // with room for all
	away       atomic.Bool        // it refuses
}

func startStation(t testing.TB, name string) *station {
	t.Helper()
	s := &station{name: name, requests: make(chan *http.Request, 10000)}
	s.addr = rawBackend(t, s.serve)
	return s
}

func (s *station) serve(r *http.Request, c *rawConn) {
	s.requests <- r
	if s.away.Load() {
		_, _ = io.WriteString(c, "HTTP/1.1 503 Away\r\nContent-Length: 0\r\n\r\n")
		return
	}
	if c.accept(r) != nil || ws.WriteFrame(c, ws.NewTextFrame([]byte(s.name))) != nil {
		return
	}
	pass(20 * time.Millisecond)
	for {
		h, payload, err := c.receive()
		switch {
		case err != nil:
			return
		case payload == "leave":
			_, _ = c.Write(frame.AppendClose(nil, 1012, "", false))
			_, _, _, _ = c.receiveClose()
			return
		case h.OpCode == ws.OpPing:
			h.OpCode = ws.OpPong
		default:
		}
		if _, err := c.Write(frame.Append(nil, h.OpCode, []byte(payload), false)); err != nil || h.OpCode == ws.OpClose {
			return
		}
	}
}

// dialTarget opens a WebSocket and returns it with the first that it says.
func dialTarget(t testing.TB, p *proxy, target string) (c *rawConn, hello string) {
	t.Helper()
	res, c := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, ""), "/chat?x=1", target, 1))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status: got %d, want 101", res.StatusCode)
	}
	_, hello, err := c.receive()
	if err != nil {
		t.Fatal(err)
	}
	return c, hello
}

// I4: what came while there was no backend comes first, then what the client says live,
// also if the backend speaks before it has read anything and the client answers it.
func TestI4QueueComesFirst(t *testing.T) {
	s := startStation(t, "hello")
	var site strings.Builder
	modes := []string{"unacked", "unsent", "strict", "off"}
	for _, mode := range modes {
		fmt.Fprintf(&site, "websocket_proxy /%s %s {\n resume_interval 1ms 20ms\n replay %s\n}\n", mode, s.addr, mode)
	}
	p := startCaddy(t, "", site.String())
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			c, hello := dialTarget(t, p, "/"+mode)
			if hello != s.name {
				t.Errorf("greeting: got %q, want %q", hello, s.name)
			}
			message := func(n int) string { return fmt.Sprintf("%d %s", n, strings.Repeat("x", 10_000)) }
			say := func(from, to int) {
				for n := from; n < to; n++ {
					c.send(t, ws.OpText, message(n))
				}
			}
			say(0, 5)
			s.away.Store(true)
			c.send(t, ws.OpText, "leave")
			p.waitState(t, p.connections(t)[0].ID, "held", "")
			say(5, 45)
			s.away.Store(false)
			for n := range 50 {
				if n == 5 {
					c.wantText(t, s.name)
					say(45, 50) // to a backend that has hardly begun with the queue
				}
				c.wantText(t, message(n))
			}
			c.Close()
			p.waitEmpty(t)
		})
	}
}

// I5: connections that wait for nothing keep nothing, whatever they said before.
func TestI5IdleConnectionsKeepNothing(t *testing.T) {
	const clients = 200
	backend := startBackend(t, "coder", "b")
	p := startCaddy(t, "metrics", "websocket_proxy "+backend.addr)
	kept := func() (gauge, buffered float64) {
		for _, c := range p.resumed(t) {
			buffered += float64(c.Buffered)
		}
		return p.value(t, "caddy_connections_replay_bytes"), buffered
	}
	all := make([]*rawConn, clients)
	for i := range all {
		all[i] = rawDial(t, p.addr, "")
		_ = all[i].SetDeadline(time.Now().Add(2 * time.Minute))
	}
	for range 2 {
		backend.freeze(t)
		for i, c := range all {
			c.send(t, ws.OpText, numbered(i, 15))
		}
		if !eventually(15*time.Second, func() bool { _, buffered := kept(); return buffered >= 3000*clients }) {
			_, buffered := kept()
			t.Errorf("while nothing is read: got %v bytes buffered, want all", buffered)
		}
		if gauge, _ := kept(); gauge < 3000*clients {
			t.Errorf("while nothing is read: got replay_bytes %v, want that of all", gauge)
		}
		backend.thaw(t)
		if !eventually(15*time.Second, func() bool { gauge, buffered := kept(); return gauge == 0 && buffered == 0 }) {
			gauge, buffered := kept()
			t.Errorf("idle: got replay_bytes %v and %v bytes buffered, want none", gauge, buffered)
		}
	}
	if now := p.stats(t); now.ByState["open"] != clients {
		t.Errorf("connections: got %v, want %d open", now.ByState, clients)
	}
}

// burst sends messages as fast as they are taken.
func (k *talker) burst(n int) {
	for range n {
		if k.conn.Write(k.ctx, websocket.MessageText, []byte(numbered(k.id, int(k.sent.Load())))) != nil {
			return
		}
		k.sent.Add(1)
	}
}

// I6: a client that says more than may be kept is paused, which loses nothing, or is
// closed. I7: what is kept is limited for each connection, and for all.
func TestI6OverflowAndI7Memory(t *testing.T) {
	const buffer, sharing, memory = 8 << 10, 48 << 10, 64 << 10
	backend := startBackend(t, "coder", "b")
	var site strings.Builder
	for path, options := range map[string]string{
		"pause": "replay_buffer 8KiB",
		"close": "replay_buffer 8KiB\n replay_overflow close",
		"share": "replay_buffer 48KiB\n replay unsent",
	} {
		fmt.Fprintf(&site, "websocket_proxy /%s %s {\n name %[1]s\n resume_interval 10ms 50ms\n %[3]s\n}\n", path, backend.addr, options)
	}
	p := startCaddy(t, "metrics\nconnection_registry {\n replay_memory 64KiB\n}", site.String())
	before := p.stats(t).ClosedByReason["overflow"]
	var all []*talker
	for i, path := range []string{"pause", "share", "share", "share", "close"} {
		all = append(all, dialTalker(t, p, i, "/"+path))
		all[i].burst(1)
	}
	if !eventually(15*time.Second, func() bool {
		return len(backend.records(t)) == 1+2*len(all) && p.value(t, "caddy_connections_replay_bytes") == 0
	}) {
		t.Error("what was said first is not acknowledged")
	}
	kill(t, backend)
	// full waits until connections of a route keep between so many bytes.
	full := func(route string, least, most int64) {
		t.Helper()
		var sum int64
		if !eventually(15*time.Second, func() bool {
			var list struct{ Connections []resumption }
			p.call(t, http.MethodGet, "/connections?state=held&route="+route, &list)
			sum = 0
			for _, c := range list.Connections {
				sum += c.Buffered
			}
			return sum >= least
		}) || sum > most {
			t.Errorf("%s: got %d bytes kept, want %d to %d", route, sum, least, most)
		}
	}
	last, rest := all[4], all[:4]
	last.burst(20) // fits
	full("close", 3000, buffer)
	last.burst(200)
	<-last.over
	if want := (ending{Code: 1013, Reason: "too many messages while no backend is available", Clean: true}); last.end != want {
		t.Errorf("replay_overflow close: got %+v, want %+v", last.end, want)
	}
	p.waitReason(t, "overflow", before, 1)
	rest[0].burst(40)
	full("pause", buffer-4000, buffer)
	rest[1].burst(300)
	full("share", sharing-4000, sharing)
	rest[2].burst(300)
	rest[3].burst(300)
	var got float64
	if !eventually(15*time.Second, func() bool { got = p.value(t, "caddy_connections_replay_bytes"); return got >= memory-8000 }) || got > memory {
		t.Errorf("replay_bytes: got %v, want almost all of %d and not more", got, memory)
	}
	full("pause", buffer-4000, buffer)
	full("share", sharing-4000, memory-buffer+4000)
	backend.restart(t)
	for _, k := range rest {
		k.start()
	}
	p.waitOn(t, 20*time.Second, map[string]int{backend.addr: len(rest)})
	finishTalkers(t, rest)
	wantKept(t, rest, promise{}, 2, backend)
}

// I8: upstreams come and go by Caddy's config API, while clients chat. One that has come
// gets new connections, one that goes is left within the drain window; nothing is lost
// or comes twice. A change that is refused changes nothing.
func TestI8UpstreamsComeAndGoByTheConfigAPI(t *testing.T) {
	window := long(time.Second, 5*time.Second)
	a, b, c := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b"), startBackend(t, "coder", "c")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n drain_window %v\n}", a.addr, window))
	all := startTalkers(t, p, 20)
	dial := func(b *backendProcess) string { return fmt.Sprintf(`{"dial":%q}`, b.addr) }
	for _, change := range []struct {
		method, at, body string
		good             bool
		join             int // how many clients come afterwards
		want             map[string]int
	}{
		{"POST", "", dial(b), true, 10, map[string]int{a.addr: 20, b.addr: 10}},
		{"DELETE", "/0", "", true, 3, map[string]int{b.addr: 33}},
		{"DELETE", "/0", "", false, 0, map[string]int{b.addr: 33}}, // the last
		{"POST", "", `{"dial":"http://x/path"}`, false, 0, map[string]int{b.addr: 33}},
		{"PATCH", "/0", dial(c), true, 1, map[string]int{c.addr: 34}},
		{"POST", "/...", "[" + dial(a) + "," + dial(b) + "]", true, 8, map[string]int{c.addr: 34, a.addr: 4, b.addr: 4}},
		{"PATCH", "", "[" + dial(b) + "]", true, 0, map[string]int{b.addr: 42}},
	} {
		path := "/config/apps/http/servers/srv0/routes/0/handle/0/routes/0/handle/0/upstreams" + change.at
		req, err := http.NewRequest(change.method, "http://"+p.admin+path, strings.NewReader(change.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Close = true // a change restarts the admin endpoint
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if said := body(t, res); (res.StatusCode == http.StatusOK) != change.good {
			t.Fatalf("%s %s %s: got %d %s, want it to be done: %v", change.method, path, change.body, res.StatusCode, said, change.good)
		}
		p.waitListeners(t)
		for range change.join {
			all = append(all, startTalker(t, p, len(all), "/?echo=1"))
		}
		p.waitOn(t, window+20*time.Second, change.want)
	}
	pass(200 * time.Millisecond)
	finishTalkers(t, all)
	wantWhole(t, all, 4, a, b, c)
}

// I10: each connection has a name of its own, the same at every backend and in the API,
// also where clients share the ID in their path; path and query stay as they were sent.
// I3: the next backend is never the one that was lost, though that accepts, while there
// is another.
func TestI10ConnectionsHaveNamesOfTheirOwn(t *testing.T) {
	const target, clients, rounds = "/listener/6ba7b810-9dad-11d1-80b4-00c04fd430c8/%E2%82%AC%2F?token=a%2Fb+c&empty=&token=;", 3, 6
	a, b := startStation(t, "a"), startStation(t, "b")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n resume_interval 1ms 10ms\n}", a.addr, b.addr))
	for range clients {
		c, on := dialTarget(t, p, target)
		for range rounds {
			c.send(t, ws.OpText, "leave")
			on = map[string]string{"a": "b", "b": "a"}[on]
			c.wantText(t, on)
		}
		c.send(t, ws.OpText, "hello")
		c.wantText(t, "hello")
	}
	asked := make(map[string][]string) // Holdfast-Resume by Holdfast-Connection
	for _, s := range []*station{a, b} {
		for range len(s.requests) {
			r := <-s.requests
			id := r.Header.Get("Holdfast-Connection")
			asked[id] = append(asked[id], r.Header.Get("Holdfast-Resume"))
			if r.RequestURI != target {
				t.Errorf("request: got %s, want %s", r.RequestURI, target)
			}
		}
	}
	want := append([]string{""}, slices.Repeat([]string{"attempt=1, replayed=0, cause=1012"}, rounds)...)
	for _, c := range p.connections(t) {
		if got := slices.Sorted(slices.Values(asked[c.ID])); !slices.Equal(got, want) || c.URI != target {
			t.Errorf("connection %s to %s: got handshakes %q, want %q, to %s", c.ID, c.URI, got, want, target)
		}
		delete(asked, c.ID)
	}
	if n := p.stats(t).Total; n != clients || len(asked) > 0 {
		t.Errorf("connections: got %d, want %d; backends were told of %v besides", n, clients, asked)
	}
}
