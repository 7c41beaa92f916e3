// This file moves connections by the admin API.

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// witness is a backend that tells what happens to it, and waits where it is told to.
type witness struct {
	addr string

	mu       sync.Mutex
	requests []*http.Request
	texts    []string
	code     uint16        // of the close frame it got
	status   int           // with which it refuses; 0: it accepts
	subproto string        // with which it answers
	farewell []string      // what it sends after it got a close frame, before its own
	hold     chan struct{} // closed when it may answer a close frame; nil: at once
}

func startWitness(t testing.TB) *witness {
	t.Helper()
	w := new(witness)
	w.addr = rawBackend(t, w.serve)
	return w
}

func (w *witness) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *witness) serve(r *http.Request, c *rawConn) {
	w.mu.Lock()
	w.requests = append(w.requests, r)
	status, subproto := w.status, w.subproto
	w.mu.Unlock()
	if status != 0 {
		fmt.Fprintf(c, "HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n", status)
		return
	}
	var extra []string
	if subproto != "" {
		extra = append(extra, "Sec-WebSocket-Protocol: "+subproto+"\r\n")
	}
	if c.accept(r, extra...) != nil {
		return
	}
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		switch h.OpCode {
		case ws.OpPing:
			_ = ws.WriteFrame(c, ws.NewPongFrame([]byte(payload)))
		case ws.OpClose:
			w.bye(c, payload)
			return
		case ws.OpPong:
		default:
			w.set(func() { w.texts = append(w.texts, payload) })
			if h.Fin {
				_ = ws.WriteFrame(c, ws.NewTextFrame([]byte("echo "+payload)))
			}
		}
	}
}

func (w *witness) bye(c *rawConn, payload string) {
	w.mu.Lock()
	if len(payload) >= 2 {
		w.code = uint16(payload[0])<<8 | uint16(payload[1])
	}
	hold, farewell := w.hold, w.farewell
	w.mu.Unlock()
	for i, text := range farewell {
		if i == len(farewell)-1 && hold != nil {
			<-hold
			hold = nil
		}
		_ = ws.WriteFrame(c, ws.NewTextFrame([]byte(text)))
	}
	if hold != nil {
		<-hold
	}
	_ = ws.WriteFrame(c, ws.NewCloseFrame([]byte(payload)))
}

// got returns what the witness has seen.
func (w *witness) got() (requests []*http.Request, texts []string, code uint16) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.requests), slices.Clone(w.texts), w.code
}

// migrate asks for a connection to be moved and returns the status.
func (p *proxy) migrate(t testing.TB, id string) int {
	t.Helper()
	return p.call(t, http.MethodPost, "/connections/"+id+"/migrate", nil)
}

// waitState waits until a connection has a state and an upstream.
func (p *proxy) waitState(t testing.TB, id, state, upstream string) {
	t.Helper()
	var c resumption
	if !eventually(10*time.Second, func() bool {
		c = resumption{}
		p.call(t, http.MethodGet, "/connections/"+id, &c)
		return c.State == state && c.Upstream == upstream
	}) {
		t.Fatalf("connection: got %s on %s, want %s on %s", c.State, c.Upstream, state, upstream)
	}
}

func (c *rawConn) wantText(t testing.TB, want string) {
	t.Helper()
	for {
		h, got, err := c.receive()
		if err == nil && h.OpCode == ws.OpPing {
			continue
		}
		if err != nil || h.OpCode != ws.OpText || got != want {
			t.Fatalf("got %v %q, %v; want %q", h.OpCode, got, err, want)
		}
		return
	}
}

// The life of a move, seen from all sides.
func TestMigrate(t *testing.T) {
	for _, settings := range []string{"replay unacked", "replay unsent", "replay strict", "replay off", "resume_timeout off", "ping_interval off"} {
		t.Run(settings, func(t *testing.T) {
			a, b := startWitness(t), startWitness(t)
			hold := make(chan struct{})
			a.farewell, a.hold = []string{"late 1", "late 2"}, hold
			site := func(to string) string { return fmt.Sprintf("websocket_proxy %s {\n %s\n}", to, settings) }
			p := startCaddy(t, "", site(a.addr))
			c := rawDial(t, p.addr, "Cookie: a=1\r\n")
			// The second upstream comes with a reload, so that the connection is on the first.
			p.reload(t, p.siteConfig("", site(a.addr+" "+b.addr)))
			id := p.connections(t)[0].ID
			c.send(t, ws.OpText, "one")
			c.wantText(t, "echo one")

			if status, body := p.request(t, http.MethodPost, "/connections/"+id+"/migrate"); status != http.StatusAccepted || len(body) != 0 {
				t.Fatalf("got %d %q, want 202 and no body", status, body)
			}
			// The old backend has its farewell before the new one has the connection.
			c.wantText(t, "late 1")
			p.waitState(t, id, "migrating", a.addr)
			if status := p.migrate(t, id); status != http.StatusConflict {
				t.Errorf("a second request while it is moved: got %d, want 409", status)
			}
			var list struct{ Connections []resumption }
			if p.call(t, http.MethodGet, "/connections?state=migrating", &list); len(list.Connections) != 1 || list.Connections[0].ID != id {
				t.Errorf("connections that are migrating: got %+v, want the one", list)
			}
			if got := p.stats(t).ByState["migrating"]; got != 1 {
				t.Errorf("stats: got %d migrating, want 1", got)
			}
			if settings != "replay off" && settings != "resume_timeout off" {
				c.send(t, ws.OpText, "meanwhile")
				if !eventually(5*time.Second, func() bool { return p.resumed(t)[0].Buffered > int64(len("meanwhile")) }) {
					t.Errorf("got %+v, want bytes buffered", p.resumed(t))
				}
			} else {
				c.send(t, ws.OpText, "meanwhile") // and waits in the kernel
			}
			close(hold)
			c.wantText(t, "late 2")
			c.wantText(t, "echo meanwhile")
			p.waitState(t, id, "open", b.addr)
			c.send(t, ws.OpText, "two")
			c.wantText(t, "echo two")

			requests, texts, code := a.got()
			if len(requests) != 1 || !slices.Equal(texts, []string{"one"}) || code != 1001 {
				t.Errorf("old backend: got %d requests, messages %q, close code %d; want one, and 1001", len(requests), texts, code)
			}
			requests, texts, _ = b.got()
			if len(requests) != 1 || !slices.Equal(texts, []string{"meanwhile", "two"}) {
				t.Fatalf("new backend: got %d requests, messages %q", len(requests), texts)
			}
			r := requests[0]
			if got := r.Header.Get("Holdfast-Resume"); got != "attempt=1, replayed=0, cause=1001" {
				t.Errorf("Holdfast-Resume: got %q", got)
			}
			if r.Header.Get("Holdfast-Connection") != id || r.URL.String() != "/chat?x=1" || r.Header.Get("Cookie") != "a=1" || r.Host != p.addr {
				t.Errorf("request of the new backend: got %s of %s with %v, want the client's, id %s", r.URL, r.Host, r.Header, id)
			}
			got := p.resumed(t)
			if len(got) != 1 || got[0] != (resumption{ID: id, State: "open", Upstream: b.addr, Dial: b.addr, Resumes: 1}) && settings == "replay unsent" {
				t.Errorf("connection: got %+v", got)
			}
			if got[0].Resumes != 1 || got[0].Replayed != 0 {
				t.Errorf("connection: got %+v, want one resume, nothing replayed", got[0])
			}
			c.sendClose(t, 1000, "")
			if code, _, _, err := c.receiveClose(); err != nil || code != 1000 {
				t.Errorf("close: got %d, %v", code, err)
			}
		})
	}
}

// What cannot be moved, and what is no request.
func TestMigrateRefusals(t *testing.T) {
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	site := func(to ...string) string { return "websocket_proxy " + strings.Join(to, " ") }
	p := startCaddy(t, "", site(a.addr))
	c := rawDial(t, p.addr, "")
	id := p.connections(t)[0].ID
	want := func(what, method, path string, status int) {
		t.Helper()
		if got, body := p.request(t, method, path); got != status {
			t.Errorf("%s: got %d %s, want %d", what, got, body, status)
		}
	}
	path := "/connections/" + id + "/migrate"
	want("the only upstream", "POST", path, http.StatusConflict)
	want("no such connection", "POST", "/connections/00000000-0000-0000-0000-000000000000/migrate", http.StatusNotFound)
	for _, method := range []string{"GET", "PUT", "DELETE", "PATCH"} {
		want(method, method, path, http.StatusMethodNotAllowed)
	}
	want("a parameter", "POST", path+"?to="+b.addr, http.StatusBadRequest)

	a.freeze(t)
	kill(t, a)
	p.waitState(t, id, "held", "")
	want("held, one upstream", "POST", path, http.StatusConflict)
	p.reload(t, p.siteConfig("", site(a.addr, b.addr)))
	p.waitState(t, id, "open", b.addr)
	kill(t, b)
	p.waitState(t, id, "held", "")
	want("held, two upstreams", "POST", path, http.StatusConflict)
	if got := p.stats(t).ByState["held"]; got != 1 {
		t.Errorf("stats: got %d held, want 1", got)
	}
	var list struct{ Connections []resumption }
	if p.call(t, http.MethodGet, "/connections?state=held", &list); len(list.Connections) != 1 || list.Connections[0].ID != id {
		t.Errorf("connections that are held: got %+v, want the one", list)
	}
	a.restart(t)
	p.waitState(t, id, "open", a.addr)
	c.sendClose(t, 1000, "")
	_, _, _, _ = c.receiveClose()
	c.Close()
	p.waitEmpty(t)
	want("it has ended", "POST", path, http.StatusNotFound)
}

// A connection whose move finds no backend stays where it is, without a pause, and can
// be moved later.
func TestMigrateToNobody(t *testing.T) {
	for _, test := range []struct {
		name   string
		target func(w *witness)
		offer  string
	}{
		{"403", func(w *witness) { w.status = 403 }, ""},
		{"503", func(w *witness) { w.status = 503 }, ""},
		{"429", func(w *witness) { w.status = 429 }, ""},
		{"200", func(w *witness) { w.status = 200 }, ""},
		{"other subprotocol", func(w *witness) { w.subproto = "two" }, "Sec-WebSocket-Protocol: one, two\r\n"},
		{"no subprotocol", func(w *witness) {}, "Sec-WebSocket-Protocol: one, two\r\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := startWitness(t), startWitness(t)
			test.target(b)
			if test.offer != "" {
				a.subproto = "one"
			}
			p := startCaddy(t, "metrics", "websocket_proxy "+a.addr+" {\n name app\n}")
			c := rawDial(t, p.addr, test.offer)
			p.reload(t, p.siteConfig("metrics", "websocket_proxy "+a.addr+" "+b.addr+" {\n name app\n}"))
			id := p.connections(t)[0].ID
			if status := p.migrate(t, id); status != http.StatusAccepted {
				t.Fatalf("got %d, want 202", status)
			}
			c.send(t, ws.OpText, "one")
			c.wantText(t, "echo one")
			p.wantMetrics(t, map[string]string{`caddy_connections_migrations_total{result="stayed",route="app"}`: "1"})
			p.waitState(t, id, "open", a.addr)
			c.send(t, ws.OpText, "two")
			c.wantText(t, "echo two")
			if _, texts, code := a.got(); code != 0 || !slices.Equal(texts, []string{"one", "two"}) {
				t.Errorf("old backend: got %q and close code %d, want both messages and no close", texts, code)
			}
			if requests, texts, _ := b.got(); len(requests) != 1 || len(texts) != 0 {
				t.Errorf("target: got %d requests and %q, want one request and no message", len(requests), texts)
			}
			if got := p.resumed(t)[0]; got.Resumes != 0 {
				t.Errorf("connection: got %+v, want no resume", got)
			}

			b.set(func() { b.status, b.subproto = 0, a.subproto })
			if status := p.migrate(t, id); status != http.StatusAccepted {
				t.Fatalf("later: got %d, want 202", status)
			}
			p.waitState(t, id, "open", b.addr)
			c.send(t, ws.OpText, "three")
			c.wantText(t, "echo three")
			p.wantMetrics(t, map[string]string{
				`caddy_connections_migrations_total{result="moved",route="app"}`:  "1",
				`caddy_connections_migrations_total{result="stayed",route="app"}`: "1",
			})
			c.sendClose(t, 1000, "")
			_, _, _, _ = c.receiveClose()
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		a := startWitness(t)
		b := startBackend(t, "coder", "b")
		p := startCaddy(t, "", "websocket_proxy "+a.addr)
		kill(t, b)
		c := rawDial(t, p.addr, "")
		p.reload(t, p.siteConfig("", "websocket_proxy "+a.addr+" "+b.addr))
		id := p.connections(t)[0].ID
		for range 3 {
			if status := p.migrate(t, id); status != http.StatusAccepted {
				t.Fatalf("got %d, want 202", status)
			}
			p.waitState(t, id, "open", a.addr)
			c.send(t, ws.OpText, "one")
			c.wantText(t, "echo one")
		}
		b.restart(t)
		if status := p.migrate(t, id); status != http.StatusAccepted {
			t.Fatalf("later: got %d, want 202", status)
		}
		p.waitState(t, id, "open", b.addr)
		c.sendClose(t, 1000, "")
		_, _, _, _ = c.receiveClose()
	})
	t.Run("it says nothing", func(t *testing.T) {
		a := startWitness(t)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close() // it accepts nobody; the kernel does
		p := startCaddy(t, "", "websocket_proxy "+a.addr)
		c := rawDial(t, p.addr, "")
		p.reload(t, p.siteConfig("", "websocket_proxy "+a.addr+" "+ln.Addr().String()+" {\n handshake_timeout 500ms\n}"))
		id := p.connections(t)[0].ID
		if status := p.migrate(t, id); status != http.StatusAccepted {
			t.Fatalf("got %d, want 202", status)
		}
		p.waitState(t, id, "migrating", a.addr)
		c.send(t, ws.OpText, "one")
		c.wantText(t, "echo one") // it is served meanwhile
		p.waitState(t, id, "open", a.addr)
		c.send(t, ws.OpText, "two")
		c.wantText(t, "echo two")
		c.sendClose(t, 1000, "")
		_, _, _, _ = c.receiveClose()
	})
}

// A move waits for the end of the message that is under way, which the old backend
// gets whole. One that does not go on keeps the connection where it is.
func TestMigrateInTheMiddleOfAMessage(t *testing.T) {
	a, b := startWitness(t), startWitness(t)
	p := startCaddy(t, "", "websocket_proxy "+a.addr)
	c := rawDial(t, p.addr, "")
	p.reload(t, p.siteConfig("", "websocket_proxy "+a.addr+" "+b.addr))
	id := p.connections(t)[0].ID
	part := func(f ws.Frame) {
		t.Helper()
		if err := ws.WriteFrame(c, ws.MaskFrame(f)); err != nil {
			t.Fatal(err)
		}
	}
	first := ws.NewTextFrame([]byte("a"))
	first.Header.Fin = false
	part(first)
	if !eventually(5*time.Second, func() bool { _, texts, _ := a.got(); return len(texts) == 1 }) {
		t.Fatal("the first fragment does not come")
	}
	if status := p.migrate(t, id); status != http.StatusAccepted {
		t.Fatalf("got %d, want 202", status)
	}
	p.waitState(t, id, "migrating", a.addr)
	if !eventually(5*time.Second, func() bool { requests, _, _ := b.got(); return len(requests) == 1 }) {
		t.Fatal("the new backend is not asked")
	}
	pass(200 * time.Millisecond)
	part(ws.NewFrame(ws.OpContinuation, true, []byte("b")))
	c.wantText(t, "echo b")
	c.send(t, ws.OpText, "next")
	c.wantText(t, "echo next")
	p.waitState(t, id, "open", b.addr)
	_, old, code := a.got()
	_, other, _ := b.got()
	if !slices.Equal(old, []string{"a", "b"}) || code != 1001 || !slices.Equal(other, []string{"next"}) {
		t.Errorf("messages: got %q closed with %d, then %q", old, code, other)
	}

	part(first)
	if !eventually(5*time.Second, func() bool { _, texts, _ := b.got(); return len(texts) == 2 }) {
		t.Fatal("the first fragment does not come")
	}
	if status := p.migrate(t, id); status != http.StatusAccepted {
		t.Fatalf("got %d, want 202", status)
	}
	p.waitState(t, id, "migrating", b.addr)
	p.waitState(t, id, "open", b.addr)
	part(ws.NewFrame(ws.OpContinuation, true, []byte("b")))
	c.wantText(t, "echo b")
	if _, texts, code := b.got(); code != 0 || len(texts) != 3 {
		t.Errorf("got %q closed with %d, want that it stays", texts, code)
	}
	c.sendClose(t, 1000, "")
	_, _, _, _ = c.receiveClose()
}

// 50 times back and forth, while the client chats: nothing is lost or comes twice.
func TestMigrateBackAndForth(t *testing.T) {
	moves := long2(20, 50)
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	n := startBackend(t, "node", "n")
	settings := []string{"replay unacked", "replay unsent", "replay strict", "replay off", "ping_interval off"}
	var site strings.Builder
	for i, more := range settings {
		to := [][2]*backendProcess{{a, b}, {a, n}, {n, b}, {b, a}, {a, b}}[i]
		fmt.Fprintf(&site, "handle /%d {\n websocket_proxy %s %s {\n name route%d\n %s\n }\n}\n", i, to[0].addr, to[1].addr, i, more)
	}
	p := startCaddy(t, "", site.String())
	var all []*talker
	for i := range settings {
		all = append(all, startTalker(t, p, i, fmt.Sprintf("/%d?echo=1", i)))
	}
	on := make(map[string]string) // upstream by id
	for _, c := range p.connections(t) {
		on[c.ID] = c.Upstream
	}
	if len(on) != len(settings) {
		t.Fatalf("connections: got %v", on)
	}
	began := time.Now()
	for n := range moves {
		for id := range on {
			if status := p.migrate(t, id); status != http.StatusAccepted {
				t.Fatalf("move %d: got %d, want 202", n, status)
			}
		}
		var got []resumption
		if !eventually(10*time.Second, func() bool {
			got = p.resumed(t)
			return len(got) == len(on) && !slices.ContainsFunc(got, func(c resumption) bool {
				return c.State != "open" || c.Upstream == on[c.ID] || c.Resumes != n+1
			})
		}) {
			t.Fatalf("move %d: got %+v, want them moved from %v", n, got, on)
		}
		for _, c := range got {
			on[c.ID] = c.Upstream
			if c.Replayed != 0 {
				t.Errorf("move %d: got %+v, want nothing replayed", n, c)
			}
		}
	}
	// A backend that gets nothing more falls silent: nobody waits for quietTimeout.
	if took := time.Since(began) / time.Duration(moves); took > 1500*time.Millisecond {
		t.Errorf("got a move every %v, want them within a fraction of a second", took)
	}
	finishTalkers(t, all)
	wantWhole(t, all, moves+1, a, b, n)
}

// Backends are killed while their connections are moved away from them, at any moment:
// nobody is dropped, and nothing is lost.
func TestMigrateFromABackendThatDies(t *testing.T) {
	const clients = 40
	backends := []*backendProcess{startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")}
	p := startCaddy(t, "metrics", fmt.Sprintf("websocket_proxy %s {\n name app\n resume_interval 20ms 200ms\n}", backends[0].addr))
	var all []*talker
	for i := range clients {
		all = append(all, startTalker(t, p, i, "/"))
	}
	p.reload(t, p.siteConfig("metrics", fmt.Sprintf("websocket_proxy %s %s {\n name app\n resume_interval 20ms 200ms\n}", backends[0].addr, backends[1].addr)))
	for round := range long2(4, 16) {
		from, to := backends[round%2], backends[1-round%2]
		pass(300 * time.Millisecond)
		frozen := round%4 >= 2
		if frozen {
			from.freeze(t) // it has read nothing more, and answers no close frame
			pass(100 * time.Millisecond)
		}
		ids := p.connections(t)
		rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
		for i, c := range ids {
			if status := p.migrate(t, c.ID); status != http.StatusAccepted {
				t.Errorf("round %d: got %d, want 202", round, status)
			}
			if i%8 == 7 {
				pass(25 * time.Millisecond) // they get more or less far
			}
		}
		kill(t, from)
		p.waitOn(t, 10*time.Second, map[string]int{to.addr: clients})
		from.restart(t)
	}
	finishTalkers(t, all)
	t.Log(grep(p.scrape(t), "caddy_connections_migrations_total"), grep(p.scrape(t), "caddy_connections_resumes_total"))

	var sum summary
	of := make(map[int][]*backendConn)
	for _, conns := range backendConns(t, backends...) {
		of[senderOf(conns)] = conns
	}
	for _, k := range all {
		del := &delivery{client: k.id, sent: int(k.sent.Load()), ended: k.end, conns: of[k.id]}
		for _, fault := range del.faults(killPromises["unacked"], 1001, 1006) {
			t.Error(fault)
		}
		sum.add(del)
	}
	t.Logf("%v", &sum)
}

// A connection may end while it is between two backends. What its client has sent
// before it closed is delivered; nothing is left of it in the end.
func TestEndWhileMigrating(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(t *testing.T, p *proxy, id string, c *rawConn)
		// after is called once the old backend has gone.
		after     func(t *testing.T, c *rawConn)
		reason    string
		delivered bool // the message that came meanwhile
	}{
		{"the client closes", func(t *testing.T, p *proxy, id string, c *rawConn) { c.sendClose(t, 1000, "bye") }, func(t *testing.T, c *rawConn) {
			if code, _, before, err := c.receiveClose(); err != nil || code != 1000 {
				t.Errorf("close: got %d after %q, %v; want 1000", code, before, err)
			}
		}, "client_closed", true},
		{"the client sends its FIN", func(t *testing.T, p *proxy, id string, c *rawConn) { _ = c.Conn.(*net.TCPConn).CloseWrite() }, nil, "client_gone", true},
		{"the client is gone", func(t *testing.T, p *proxy, id string, c *rawConn) {
			_ = c.Conn.(*net.TCPConn).SetLinger(0)
			c.Close()
		}, nil, "client_gone", false},
		{"the admin API ends it", func(t *testing.T, p *proxy, id string, c *rawConn) {
			if status := p.call(t, http.MethodDelete, "/connections/"+id+"?code=4001", nil); status != http.StatusNoContent {
				t.Errorf("got %d, want 204", status)
			}
			if code, _, before, err := c.receiveClose(); err != nil || code != 4001 {
				t.Errorf("close: got %d after %q, %v; want 4001", code, before, err)
			}
			c.sendClose(t, 4001, "")
		}, nil, "admin", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := startWitness(t), startWitness(t)
			hold := make(chan struct{})
			a.hold = hold
			p := startCaddy(t, "metrics", "websocket_proxy "+a.addr+" {\n name app\n}")
			before := p.stats(t).ClosedByReason[test.reason]
			c := rawDial(t, p.addr, "")
			p.reload(t, p.siteConfig("metrics", "websocket_proxy "+a.addr+" "+b.addr+" {\n name app\n}"))
			id := p.connections(t)[0].ID
			if status := p.migrate(t, id); status != http.StatusAccepted {
				t.Fatalf("got %d, want 202", status)
			}
			if !eventually(5*time.Second, func() bool { _, _, code := a.got(); return code == 1001 }) {
				t.Fatal("the old backend is not told")
			}
			c.send(t, ws.OpText, "meanwhile")
			if !eventually(5*time.Second, func() bool { return p.resumed(t)[0].Buffered > 0 }) {
				t.Fatalf("got %+v, want the message kept", p.resumed(t))
			}
			test.end(t, p, id, c)
			pass(100 * time.Millisecond)
			close(hold)
			if test.after != nil {
				test.after(t, c)
			}
			p.waitEmpty(t)
			if got := p.stats(t).ClosedByReason[test.reason] - before; got != 1 {
				t.Errorf("closed as %s: got %d, want one: %v", test.reason, got, p.stats(t).ClosedByReason)
			}
			_, texts, _ := b.got()
			if test.delivered && !slices.Equal(texts, []string{"meanwhile"}) || !test.delivered && len(texts) > 0 {
				t.Errorf("new backend: got %q, want what the client sent before it closed: %t", texts, test.delivered)
			}
			t.Log(grep(p.scrape(t), "caddy_connections_migrations_total"))
		})
	}
}
