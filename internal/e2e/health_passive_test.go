// This file tests what is learned of upstreams from the connections themselves.

package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// An upstream that has failed max_fails times gets no new connection for fail_duration
// after the first of these failures, and then again. Whoever finds that it fails goes
// to the next one.
func TestPassiveChecks(t *testing.T) {
	const forgotten = 2500 * time.Millisecond
	for _, tt := range []struct {
		name     string
		maxFails int
		settings string
		failing  script
	}{
		{"refused once", 1, "", answers(response(503, "busy"))},
		{"refused three times", 3, "max_fails 3", answers(response(502, "bad"))},
		{"no true upgrade", 1, "max_fails 1", wrongAccept},
		{"says nothing", 1, "handshake_timeout 1s", silent},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sick, rock := startPatient(t), startPatient(t)
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy first\n fail_duration %v\n %s\n}", sick.addr, rock.addr, forgotten, tt.settings))
			sick.answer("/chat", tt.failing)
			began := time.Now()
			wantVisits(t, "while the first upstream fails", p.visits(t, 8), map[string]int{rock.addr: 8})
			v, took := p.view(t, sick.addr), time.Since(began)
			if took < forgotten && (v.Healthy || v.Fails != tt.maxFails) {
				t.Errorf("upstream: got %+v, want it unhealthy with %d failures", v, tt.maxFails)
			}
			// On a machine that is too busy they may be forgotten meanwhile.
			if n, most := len(sick.asked("/chat")), tt.maxFails*(1+int(took/forgotten)); n < tt.maxFails || n > most {
				t.Errorf("dials of an upstream that fails: got %d in %v, want %d", n, took, tt.maxFails)
			}
			sick.answer("/chat", nil)
			p.waitHealth(t, forgotten+slack, map[string]bool{sick.addr: true, rock.addr: true})
			if early := forgotten - time.Since(began); early > 0 {
				t.Errorf("the failures were forgotten %v early", early)
			}
			wantVisits(t, "after fail_duration", p.visits(t, 2), map[string]int{sick.addr: 2})
		})
	}
}

// An answer that is the application's is no failure, nor is a client that gives up.
func TestPassiveChecksSpare(t *testing.T) {
	b := startPatient(t)
	p := startCaddy(t, "", "websocket_proxy "+b.addr+" {\n fail_duration 1h\n}")
	for _, status := range []int{401, 404, 429, 500} {
		b.answer("/chat", answers(response(status, "")))
		if got := p.status(t); got != status {
			t.Errorf("got %d, want the backend's %d", got, status)
		}
	}
	b.answer("/chat", silent)
	conn := p.asking(t)
	if !eventually(slack, func() bool { return len(b.asked("/chat")) == 5 }) {
		t.Fatal("the backend is not dialed")
	}
	conn.Close()
	p.waitEmpty(t)
	if v := p.view(t, b.addr); v.Fails != 0 || !v.Healthy {
		t.Errorf("upstream: got %+v, want no failures", v)
	}
}

// With unhealthy_latency a handshake that takes too long is a failure, though its
// client gets what it wants.
func TestUnhealthyLatency(t *testing.T) {
	slow, rock := startPatient(t), startPatient(t)
	slow.answer("/chat", func(r *http.Request, c *rawConn) {
		pass(2500 * time.Millisecond)
		echoRaw(r, c)
	})
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy first\n fail_duration 1h\n unhealthy_latency 2s\n}", slow.addr, rock.addr))
	wantVisits(t, "with a slow upstream", p.visits(t, 3), map[string]int{slow.addr: 1, rock.addr: 2})
	if v := p.view(t, slow.addr); v.Healthy || v.Fails != 1 {
		t.Errorf("upstream: got %+v, want it unhealthy with one failure", v)
	}
}

// Losing a backend is a failure of it, and so is every re-dial that fails. A client
// that is held comes back to it all the same, if there is no other; new ones do not.
func TestPassiveChecksOfHeld(t *testing.T) {
	b := startBackend(t, "coder", "b")
	p := startCaddy(t, "", "websocket_proxy "+b.addr+" {\n fail_duration 1h\n max_fails 1\n resume_interval 50ms 200ms\n}")
	c := rawDial(t, p.addr, "")
	id := p.connections(t)[0].ID
	b.freeze(t)
	kill(t, b)
	p.waitState(t, id, "held", "")
	if !eventually(slack, func() bool { return p.view(t, b.addr).Fails >= 3 }) {
		t.Errorf("upstream: got %+v, want a failure for the loss and for each re-dial", p.view(t, b.addr))
	}
	b.restart(t)
	p.waitState(t, id, "open", b.addr)
	c.send(t, ws.OpText, "still here")
	if got := p.status(t); got != http.StatusServiceUnavailable {
		t.Errorf("a new client: got %d, want 503 while the failures count", got)
	}
}

// A loss alone makes an upstream unhealthy for new connections.
func TestPassiveChecksOfLoss(t *testing.T) {
	a, b := startPatient(t), startPatient(t)
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n lb_policy first\n fail_duration 1h\n}", a.addr, b.addr))
	lose := make(chan struct{})
	a.answer("/chat", func(r *http.Request, c *rawConn) {
		if c.accept(r) == nil {
			<-lose
		}
	})
	c := rawDial(t, p.addr, "")
	id := p.connections(t)[0].ID
	a.answer("/chat", nil)
	close(lose)
	p.waitState(t, id, "open", b.addr)
	if v := p.view(t, a.addr); v.Healthy || v.Fails != 1 {
		t.Errorf("upstream: got %+v, want it unhealthy with one failure", v)
	}
	c.send(t, ws.OpText, "hello")
	c.wantText(t, "hello")
	wantVisits(t, "after a loss", p.visits(t, 2), map[string]int{b.addr: 2})
}

// With lb_try_duration a client waits until a backend is up; without, it is told at
// once.
func TestTryDuration(t *testing.T) {
	b := startBackend(t, "coder", "b")
	p := startCaddy(t, "", "handle /chat {\n websocket_proxy "+b.addr+" {\n lb_try_duration 12s\n lb_try_interval 100ms\n}\n}\n"+
		"handle /now {\n websocket_proxy "+b.addr+"\n}")
	kill(t, b)
	res, _ := rawRequest(t, p.addr, upgradeTo("/now", "Host: "+p.addr))
	if res.StatusCode != http.StatusBadGateway {
		t.Errorf("without lb_try_duration: got %d, want 502", res.StatusCode)
	}
	conn := p.asking(t)
	defer conn.Close()
	pass(time.Second)
	if s := p.stats(t); s.ByState["connecting"] != 1 {
		t.Errorf("with lb_try_duration: got %v, want a client that waits", s.ByState)
	}
	b.start(t)
	if !eventually(time.Second+slack, func() bool { return p.stats(t).ByState["open"] == 1 }) {
		t.Errorf("the backend is up: got %v, want the client let in", p.stats(t).ByState)
	}
}

// When lb_try_duration is over the client is told why.
func TestTryDurationEnds(t *testing.T) {
	sick := startPatient(t)
	sick.answer("/health", answers(response(503, "no")))
	for what, tt := range map[string]struct {
		to, settings string
		status       int
	}{
		"unhealthy":        {sick.addr, "health_ws /health", 503},
		"nobody listening": {freeAddr(t), "fail_duration 0s", 502},
		"failed lately":    {freeAddr(t), "fail_duration 1h", 502},
	} {
		t.Run(what, func(t *testing.T) {
			p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s {\n lb_try_duration 1s\n %s\n}", tt.to, tt.settings))
			if tt.to == sick.addr {
				p.waitHealth(t, slack, map[string]bool{sick.addr: false})
			}
			began := time.Now()
			if got := p.status(t); got != tt.status {
				t.Errorf("got %d, want %d", got, tt.status)
			}
			if took := time.Since(began); took < 700*time.Millisecond || took > time.Second+slack {
				t.Errorf("it took %v, want about 1s", took)
			}
		})
	}
}
