// This file moves connections by the admin API: the life of a move, and what cannot be
// moved.

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

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
				if !eventually(15*time.Second, func() bool { return p.resumed(t)[0].Buffered > int64(len("meanwhile")) }) {
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
			c.send(t, ws.OpText, "one")
			c.wantText(t, "echo one") // its session is running, else it could not be moved yet
			if status := p.migrate(t, id); status != http.StatusAccepted {
				t.Fatalf("got %d, want 202", status)
			}
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
		p.reload(t, p.siteConfig("", "websocket_proxy "+a.addr+" "+ln.Addr().String()+" {\n handshake_timeout 3s\n}"))
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
