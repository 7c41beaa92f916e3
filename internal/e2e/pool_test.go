package e2e

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// Both policies spread a fixed set of connections evenly; least_conn gives an
// upstream that lost its connections all new ones until it is level.
func TestPolicies(t *testing.T) {
	for policy, wantAfter := range map[string][3]int{
		"least_conn":  {10, 10, 10},
		"round_robin": {4, 13, 13},
	} {
		t.Run(policy, func(t *testing.T) {
			var addrs []string
			for range 3 {
				addrs = append(addrs, rawBackend(t, echoRaw))
			}
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n lb_policy %s\n}", strings.Join(addrs, " "), policy))
			conns := make(map[string]*rawConn)
			for range 30 {
				c := rawDial(t, p.addr, "")
				c.send(t, ws.OpText, "x")
				if _, _, err := c.receive(); err != nil {
					t.Fatal(err)
				}
				conns[c.LocalAddr().String()] = c
			}
			counts := func() (n [3]int) {
				by := p.stats(t).ByUpstream
				for i, a := range addrs {
					n[i] = by[a]
				}
				return n
			}
			if got := counts(); got != [3]int{10, 10, 10} {
				t.Fatalf("connections by upstream: got %v, want 10 each", got)
			}
			// Nine of the first upstream's end, and as many are opened.
			var ended int
			for _, c := range p.connections(t) {
				if c.Upstream == addrs[0] && ended < 9 {
					ended++
					if status := p.call(t, http.MethodDelete, "/connections/"+c.ID, nil); status != http.StatusNoContent {
						t.Fatalf("DELETE: status %d", status)
					}
				}
			}
			for _, c := range conns {
				_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				if _, _, _, err := c.receiveClose(); err == nil {
					c.sendClose(t, 1001, "")
					c.Close()
				}
			}
			p.waitCount(t, 21)
			for range 9 {
				rawDial(t, p.addr, "")
			}
			if got := counts(); got != wantAfter {
				t.Errorf("connections by upstream: got %v, want %v", got, wantAfter)
			}
		})
	}
}

// Every form of an upstream's address is dialed.
func TestUpstreamForms(t *testing.T) {
	tcp := rawBackend(t, echoRaw)
	path := filepath.Join(t.TempDir(), "backend.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go acceptRaw(ln, echoRaw, done)
	for _, addr := range []string{tcp, "ws://" + tcp, "http://" + tcp, "tcp/" + tcp, "unix/" + path} {
		t.Run(strings.ReplaceAll(addr, "/", "_"), func(t *testing.T) {
			p := startCaddy(t, "", "websocket_proxy {\n to "+addr+"\n}")
			c := rawDial(t, p.addr, "")
			c.send(t, ws.OpText, "hello")
			if _, got, err := c.receive(); err != nil || got != "hello" {
				t.Errorf("echo: got %q, %v", got, err)
			}
			if got := p.connections(t)[0].Upstream; got != addr {
				t.Errorf("upstream: got %q, want %q as configured", got, addr)
			}
			c.sendClose(t, 1000, "")
			_, _, _, _ = c.receiveClose()
		})
	}
}

// Heartbeats reach both legs; a client that answers stays, one that is silent is
// closed with 1001 and counted as ping_timeout.
func TestHeartbeat(t *testing.T) {
	pinged := make(chan struct{}, 100)
	backend := rawBackend(t, func(r *http.Request, c *rawConn) {
		if c.accept(r) != nil {
			return
		}
		for {
			h, payload, err := c.receive()
			if err != nil {
				return
			}
			switch h.OpCode {
			case ws.OpPing:
				c.Write(ws.MustCompileFrame(ws.NewPongFrame([]byte(payload))))
				select {
				case pinged <- struct{}{}:
				default:
				}
			case ws.OpClose:
				c.Write(ws.MustCompileFrame(ws.NewCloseFrame([]byte(payload))))
				return
			default:
			}
		}
	})
	p := startCaddy(t, "", "websocket_proxy "+backend+" {\n resume_timeout off\n ping_interval 100ms\n ping_timeout 2s\n}")
	before := p.stats(t).ClosedByReason["ping_timeout"]
	silent := rawDial(t, p.addr, "")
	lively := rawDial(t, p.addr, "")
	got := make(chan error, 1)
	go func() { // ends with the connection
		_, _, err := lively.receiveData()
		got <- err
	}()
	if code, reason, _, err := silent.receiveClose(); err != nil || code != 1001 || reason != "ping timeout" {
		t.Errorf("silent client: got %d %q, %v; want 1001", code, reason, err)
	}
	silent.sendClose(t, 1001, "")
	select {
	case <-pinged:
	default:
		t.Error("the backend got no ping")
	}
	p.waitCount(t, 1)
	select {
	case err := <-got:
		t.Errorf("lively client: it got something else than pings, or an end: %v", err)
	default:
		lively.Close()
		<-got
	}
	if got := p.stats(t).ClosedByReason["ping_timeout"] - before; got != 1 {
		t.Errorf("closed as ping_timeout: got %d, want 1", got)
	}
}

// max_lifetime, idle_timeout and first_data_timeout end connections with 1001
// and their reasons.
func TestLimitsOfTime(t *testing.T) {
	for setting, want := range map[string]string{
		"max_lifetime 300ms":       "end of lifetime",
		"idle_timeout 300ms":       "idle",
		"first_data_timeout 300ms": "no data",
	} {
		t.Run(strings.Fields(setting)[0], func(t *testing.T) {
			p := startCaddy(t, "", "websocket_proxy "+rawBackend(t, echoRaw)+" {\n "+setting+"\n}")
			c := rawDial(t, p.addr, "")
			if code, reason, _, err := c.receiveClose(); err != nil || code != 1001 || reason != want {
				t.Errorf("close: got %d %q, %v; want 1001 %q", code, reason, err, want)
			}
			c.sendClose(t, 1001, "")
		})
	}
}

// A backend that takes no bytes is lost after write_timeout; so is, with its own
// reason, a client.
func TestWriteTimeout(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	deaf := rawBackend(t, func(r *http.Request, c *rawConn) {
		if c.accept(r) == nil {
			<-hold
		}
	})
	p := startCaddy(t, "", "websocket_proxy "+deaf+" {\n resume_timeout off\n write_timeout 1s\n}")
	c := rawDial(t, p.addr, "")
	written := make(chan error, 1)
	go func() {
		chunk := ws.MustCompileFrame(ws.MaskFrame(ws.NewBinaryFrame(make([]byte, 60<<10))))
		for {
			if _, err := c.Write(chunk); err != nil {
				written <- err
				return
			}
		}
	}()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second)) // the default is 30s
	code, _, _, err := c.receiveClose()
	if err != nil || code != 1014 {
		t.Errorf("close: got %d, %v; want 1014", code, err)
	}
	c.Close()
	<-written
}
