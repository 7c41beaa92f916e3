// This file moves connections by the admin API while something is under way: messages,
// other moves, the death of a backend, the end of a connection.

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

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
	if !eventually(15*time.Second, func() bool { _, texts, _ := a.got(); return len(texts) == 1 }) {
		t.Fatal("the first fragment does not come")
	}
	if status := p.migrate(t, id); status != http.StatusAccepted {
		t.Fatalf("got %d, want 202", status)
	}
	p.waitState(t, id, "migrating", a.addr)
	if !eventually(15*time.Second, func() bool { requests, _, _ := b.got(); return len(requests) == 1 }) {
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
	if !eventually(15*time.Second, func() bool { _, texts, _ := b.got(); return len(texts) == 2 }) {
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
	quickest := time.Hour
	for n := range moves {
		began := time.Now()
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
		quickest = min(quickest, time.Since(began))
		for _, c := range got {
			on[c.ID] = c.Upstream
			if c.Replayed != 0 {
				t.Errorf("move %d: got %+v, want nothing replayed", n, c)
			}
		}
	}
	// A backend that gets nothing more falls silent: nobody waits for quietTimeout.
	if quickest > 1500*time.Millisecond {
		t.Errorf("the quickest moves took %v, want a fraction of a second", quickest)
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
		p.waitOn(t, 20*time.Second, map[string]int{to.addr: clients})
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
			if !eventually(15*time.Second, func() bool { _, _, code := a.got(); return code == 1001 }) {
				t.Fatal("the old backend is not told")
			}
			c.send(t, ws.OpText, "meanwhile")
			if !eventually(15*time.Second, func() bool { return p.resumed(t)[0].Buffered > 0 }) {
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
			var texts []string
			if !eventually(10*time.Second, func() bool {
				_, texts, _ = b.got()
				return !test.delivered || len(texts) > 0
			}) || len(texts) > 0 && (!test.delivered || !slices.Equal(texts, []string{"meanwhile"})) {
				t.Errorf("new backend: got %q, want what the client sent before it closed: %t", texts, test.delivered)
			}
			t.Log(grep(p.scrape(t), "caddy_connections_migrations_total"))
		})
	}
}
