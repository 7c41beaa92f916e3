// This file tests chains whose last hop ends the TLS, and proxies the WebSockets in it:
// what closes one hop closes the other, with a close frame where there is somebody to
// hear one (rows C5, C7, C48 and C84 of the seed matrix).

package e2e

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// webSockets is the Caddyfile of a hop that has a site, by TLS, for each lane; settings
// are those of its handler, upstreams first. The hop before says who the client is.
func (h *hop) webSockets(a *testca.Authority, lanes []string, settings func(lane string) string) string {
	_, port, _ := net.SplitHostPort(h.addr)
	globals := fmt.Sprintf("metrics\nauto_https disable_redirects\nservers :%s {\nlistener_wrappers {\n"+
		"proxy_protocol {\ntimeout 5s\nallow 127.0.0.1/32\nfallback_policy reject\n}\ntls\n}\n}", port)
	var sites strings.Builder
	for _, lane := range lanes {
		fmt.Fprintf(&sites, "https://%s.chain.test:%s {\ntls %s %s\nwebsocket_proxy %s\n}\n",
			lane, port, a.File("backend.crt"), a.File("backend.key"), settings(lane))
	}
	return h.siteConfig(globals, "respond ok") + sites.String()
}

// laneSocket is the WebSocket of a client that answers a close frame and closes.
type laneSocket struct {
	*rawConn
	secured *tls.Conn
	done    chan struct{} // closed by read, with code
	code    uint16        // of the close frame that came; 0: none
}

// socket opens a client of a lane, from another address than the proxies have.
func (c *chain) socket(t testing.TB, lane string, a *testca.Authority) *laneSocket {
	t.Helper()
	name := lane + ".chain.test"
	conn := tls.Client(dialFrom(t, "127.0.0.5", c.hops[0].addr), &tls.Config{ServerName: name, RootCAs: a.Pool()})
	if _, err := conn.Write([]byte(pathed(name, "/?echo=1", ""))); err != nil {
		t.Fatalf("%s: %v", lane, err)
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%s: got %+v, %v; want 101", lane, res, err)
	}
	s := &laneSocket{rawConn: &rawConn{Conn: conn, br: br, client: true}, secured: conn, done: make(chan struct{})}
	s.send(t, ws.OpText, "hello")
	s.wantText(t, "hello")
	return s
}

// read ends with the connection.
func (s *laneSocket) read() {
	defer close(s.done)
	var err error
	if s.code, _, _, err = s.receiveClose(); err == nil {
		_, _ = s.Write(frame.AppendClose(nil, s.code, "", true)) // if it still can
	}
	s.Close()
}

// dialFrom is dialTCP from a local address.
func dialFrom(t testing.TB, from, addr string) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn.(*net.TCPConn)
}

// socketEnd is how the WebSockets of a lane come to their end.
type socketEnd struct {
	lane         string
	outer, inner string // settings that the lane takes on, by a reload that ends it
	by           func(all []*laneSocket)
	code         uint16   // that the client gets; 0: no close frame
	wantOuter    []string // why it ended there; nil: an end, in good order or not
	wantInner    string
}

func socketEnds(t testing.TB, c *chain, kill func()) []socketEnd {
	each := func(do func(s *laneSocket)) func([]*laneSocket) {
		return func(all []*laneSocket) {
			for _, s := range all {
				do(s)
			}
		}
	}
	deletes := func(i int, lane string) func([]*laneSocket) {
		return func([]*laneSocket) {
			for _, r := range c.hops[i].connections(t) {
				if r.Route == lane {
					c.hops[i].call(t, http.MethodDelete, "/connections/"+r.ID, nil)
				}
			}
		}
	}
	return []socketEnd{
		{lane: "client-closes", by: each(func(s *laneSocket) { s.sendClose(t, 1000, "") }), code: 1000, wantInner: "client_closed"},
		{lane: "client-ends", by: each(func(s *laneSocket) { _ = s.secured.CloseWrite(); _ = s.secured.NetConn().(*net.TCPConn).CloseWrite() }), wantInner: "client_gone"},
		{lane: "client-resets", by: each(func(s *laneSocket) { resetTCP(s.secured.NetConn().(*net.TCPConn)) }), wantOuter: []string{"reset"}, wantInner: "client_gone"},
		{lane: "backend-closes", by: each(func(s *laneSocket) { s.send(t, ws.OpText, "close") }), code: 1000, wantInner: "backend_closed"},
		{lane: "backend-killed", by: func([]*laneSocket) { kill() }, code: 1014, wantInner: "backend_lost"},
		{lane: "idle-inner", inner: "idle_timeout 1ms", code: 1001, wantInner: "idle"},
		{lane: "idle-outer", outer: idleNow, wantOuter: []string{"idle"}, wantInner: "client_gone"},
		{lane: "lifetime-inner", inner: "max_lifetime 1ms", code: 1001, wantInner: "lifetime"},
		{lane: "lifetime-outer", outer: "max_lifetime 1ms", wantOuter: []string{"lifetime"}, wantInner: "client_gone"},
		{lane: "admin-inner", by: deletes(1, "admin-inner"), code: 1001, wantInner: "admin"},
		{lane: "admin-outer", by: deletes(0, "admin-outer"), wantOuter: []string{"admin"}, wantInner: "client_gone"},
	}
}

// closesIfAsked echoes, and closes when a message says so.
func closesIfAsked(r *http.Request, c *rawConn) {
	if c.accept(r) != nil {
		return
	}
	for {
		h, payload, err := c.receive()
		switch {
		case err != nil:
			return
		case h.OpCode == ws.OpClose:
			_ = ws.WriteFrame(c, ws.NewCloseFrame([]byte(payload)))
			return
		case payload == "close":
			_ = ws.WriteFrame(c, ws.NewCloseFrame(ws.NewCloseFrameBody(1000, "")))
		case h.OpCode == ws.OpText:
			_ = ws.WriteFrame(c, ws.NewTextFrame([]byte(payload)))
		}
	}
}

// wss goes through a tunnel to a proxy of WebSockets. However one ends, and wherever, soon
// neither hop has it any more.
func TestChainOfBoth(t *testing.T) {
	a := testca.New(t)
	a.Issue(t, "backend", "*.chain.test")
	backend, mortal := rawBackend(t, closesIfAsked), startBackend(t, "coder", "mortal")
	lanes := []string{"stays"}
	outer, inner := make(map[string]string), make(map[string]string) // what lanes take on
	c := startChain(t, 2, func(c *chain, h *hop, i int) string {
		if i == 0 {
			return c.tunnels(h, i, lanes, func(lane string) (string, string) { return "", outer[lane] })
		}
		return h.webSockets(a, lanes, func(lane string) string {
			to := backend
			if lane == "backend-killed" {
				to = mortal.addr
			}
			return fmt.Sprintf("%s {\n name %s\n resume_timeout off\n %s\n}", to, lane, inner[lane])
		})
	})
	ends := socketEnds(t, c, func() { kill(t, mortal) })
	for _, e := range ends {
		lanes = append(lanes, e.lane)
	}
	c.reload(t)
	before := c.sockets(t)
	stays := c.socket(t, "stays", a)
	inside := make(map[string][]*laneSocket)
	for _, e := range ends {
		outer[e.lane], inner[e.lane] = e.outer, e.inner
		for range perLane {
			s := c.socket(t, e.lane, a)
			inside[e.lane] = append(inside[e.lane], s)
		}
	}
	for _, e := range ends {
		c.waitRoute(t, e.lane, perLane)
	}
	for i, h := range c.hops {
		for _, r := range h.connections(t) {
			if r.Client != "127.0.0.5" {
				t.Errorf("hop %d: got client %s, want 127.0.0.5", i, r.Client)
			}
		}
	}
	for _, e := range ends {
		if e.by != nil {
			e.by(inside[e.lane])
		}
		for _, s := range inside[e.lane] {
			go s.read()
		}
	}
	c.reload(t)
	for _, e := range ends {
		c.wantSocketsEnded(t, e, inside[e.lane])
	}
	stays.send(t, ws.OpText, "still")
	stays.wantText(t, "still")
	c.waitRoute(t, "stays", 1)
	stays.sendClose(t, 1000, "")
	stays.hears(t, "client", says{1000, ""})
	stays.Close()
	c.waitEmpty(t)
	c.waitSockets(t, before)

	for i, h := range c.hops {
		s := c.socket(t, "stays", a)
		go s.read()
		_ = h.cmd.Process.Kill()
		<-s.done
		<-h.exited
		c.waitEmpty(t, i)
		c.start(t, i)
	}
	if got := c.hops[0].reasons(t, "stays"); got["eof"]+got["reset"] != 1 {
		t.Errorf("after a kill of hop 1, hop 0 has closed as %v, want one as eof or reset", got)
	}
	s := c.socket(t, "stays", a)
	s.sendClose(t, 1000, "")
	s.hears(t, "client", says{1000, ""})
	s.Close()
	c.waitEmpty(t)
}

// wantSocketsEnded checks how the WebSockets of a lane have ended.
func (c *chain) wantSocketsEnded(t testing.TB, e socketEnd, all []*laneSocket) {
	t.Helper()
	c.waitRoute(t, e.lane, 0)
	for _, s := range all {
		select {
		case <-s.done:
			if s.code != e.code {
				t.Errorf("%s: the client got code %d, want %d", e.lane, s.code, e.code)
			}
		case <-time.After(closeBound):
			t.Errorf("%s: the client hears no end", e.lane)
		}
	}
	if got := c.hops[1].reasons(t, e.lane); got[e.wantInner] != perLane {
		t.Errorf("%s: the inner hop has closed as %v, want all as %s", e.lane, got, e.wantInner)
	}
	want := e.wantOuter
	if want == nil {
		want = []string{"eof", "reset"}
	}
	got, total := c.hops[0].reasons(t, e.lane), 0
	for reason, n := range got {
		if slices.Contains(want, reason) {
			total += n
		}
	}
	if total != perLane {
		t.Errorf("%s: the outer hop has closed as %v, want all as one of %v", e.lane, got, want)
	}
}
