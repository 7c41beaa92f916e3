// This file tests whose health an upstream's state is: which reloads and routes share it.

package e2e

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// A reload with the same check keeps what is known: an unhealthy upstream stays out,
// and no probe is made for it. With another check everything begins anew.
func TestHealthOverReload(t *testing.T) {
	sick, rock := startPatient(t), startPatient(t)
	sick.answer("/health", answers(response(503, "no")))
	site := func(more string) string {
		return fmt.Sprintf("websocket_proxy %s %s {\n lb_policy round_robin\n %s\n}", sick.addr, rock.addr, more)
	}
	p := startCaddy(t, "", site("health_ws /health"))
	out := map[string]bool{sick.addr: false, rock.addr: true}
	p.waitHealth(t, slack, out)
	for _, more := range []string{"idle_timeout 1h", "lb_retries 3\n fail_duration 1s"} {
		p.reload(t, p.siteConfig("", site("health_ws /health\n"+more)))
		p.waitHealth(t, 0, out)
		wantVisits(t, "after a reload", p.visits(t, 2), map[string]int{rock.addr: 2})
	}
	pass(time.Second)
	for _, b := range []*patient{sick, rock} {
		if n := len(b.asked("/health")); n != 1 {
			t.Errorf("probes over two reloads: got %d, want one", n)
		}
	}

	p.reload(t, p.siteConfig("", site("health_ws /other")))
	both := map[string]bool{sick.addr: true, rock.addr: true}
	p.waitHealth(t, 0, both)
	wantVisits(t, "with another check", p.visits(t, 2), one(sick.addr, rock.addr))
	if !eventually(slack, func() bool { return len(sick.asked("/other")) == 1 && len(rock.asked("/other")) == 1 }) {
		t.Error("the other check makes no probe")
	}
	p.reload(t, p.siteConfig("", site("")))
	p.waitHealth(t, 0, both)
}

// A config that does not start leaves the state, and the checks, as they are.
func TestHealthOverFailedReload(t *testing.T) {
	sick := startPatient(t)
	sick.answer("/health", answers(response(503, "no")))
	const checks = "health_interval 300ms\n health_ws /health"
	p := startCaddy(t, "", "websocket_proxy "+sick.addr+" {\n "+checks+"\n}")
	p.waitHealth(t, slack, map[string]bool{sick.addr: false})
	bad := p.siteConfig("", "websocket_proxy "+sick.addr+" {\n "+checks+"\n idle_timeout 1h\n}") +
		"http://192.0.2.1:80 {\n bind 192.0.2.1\n}\n" // an address that this machine has not
	if status, _ := p.submit(t, "text/caddyfile", []byte(bad)); status == http.StatusOK {
		t.Fatal("the config loads: the test is void")
	}
	p.waitHealth(t, 0, map[string]bool{sick.addr: false})
	sick.answer("/health", nil)
	p.waitHealth(t, slack, map[string]bool{sick.addr: true})
}

// Routes that check one address in the same way share the probes and what they say;
// those that check it in different ways have nothing in common.
func TestHealthOfRoutes(t *testing.T) {
	b := startPatient(t)
	b.answer("/deep", answers(response(503, "the database is away")))
	route := func(name, checks string) string {
		return fmt.Sprintf("handle /%s {\n rewrite /chat\n websocket_proxy %s {\n name %s\n health_interval 1m\n %s\n }\n}\n", name, b.addr, name, checks)
	}
	p := startCaddy(t, "", route("shallow", "health_ws /health")+route("deep", "health_ws /deep")+route("also-deep", "health_ws /deep")+
		route("deep-by-http", "health_http /deep"))
	healthy := func() map[string]bool {
		got := make(map[string]bool)
		for _, v := range p.views(t) {
			got[v.Route] = v.Healthy
		}
		return got
	}
	want := map[string]bool{"shallow": true, "deep": false, "also-deep": false, "deep-by-http": false}
	if !eventually(slack, func() bool { return fmt.Sprint(healthy()) == fmt.Sprint(want) }) {
		t.Errorf("healthy: got %v, want %v", healthy(), want)
	}
	pass(500 * time.Millisecond)
	if n := len(b.asked("/deep")); n != 2 {
		t.Errorf("probes: got %d, want one of two routes together and one by HTTP", n)
	}
	for name, status := range map[string]int{"shallow": 101, "deep": 503, "also-deep": 503, "deep-by-http": 503} {
		res, c := rawRequest(t, p.addr, upgradeTo("/"+name, "Host: "+p.addr))
		if res.StatusCode != status {
			t.Errorf("route %s: got %d, want %d", name, res.StatusCode, status)
		}
		c.Close()
	}
}

// Who waits for an upstream has it probed sooner than its interval says: clients that
// are held because the only one is unhealthy, and clients that want to be let in, come
// to it soon after it is well.
func TestHurriedProbe(t *testing.T) {
	sick := startPatient(t)
	site := func(more string) string {
		return "websocket_proxy " + sick.addr + " {\n resume_interval 50ms 200ms\n " + more + "\n}"
	}
	p := startCaddy(t, "", site(""))
	hold := make(chan struct{})
	sick.answer("/chat", func(r *http.Request, c *rawConn) {
		if c.accept(r) == nil {
			<-hold // and breaks
		}
	})
	held := p.enter(t, "")
	sick.answer("/chat", nil)
	sick.answer("/health", answers(response(503, "no")))
	p.reload(t, p.siteConfig("", site("lb_try_duration 20s\n health_interval 1h\n health_ws /health")))
	p.waitHealth(t, slack, map[string]bool{sick.addr: false})
	if c := p.connections(t)[0]; c.State != "open" {
		t.Errorf("the only upstream has become unhealthy: got a connection in state %s, want that it stays", c.State)
	}
	close(hold)
	p.waitState(t, p.connections(t)[0].ID, "held", "")
	// It is asked again and again, but not more than about once a second.
	before, began := len(sick.asked("/health")), time.Now()
	pass(2500 * time.Millisecond)
	n := len(sick.asked("/health")) - before
	if took := time.Since(began); n < 1 || n > 1+int(took/time.Second) {
		t.Errorf("probes in %v while a client is held: got %d, want about one a second", took, n)
	}
	if n := len(sick.asked("/chat")); n != 1 {
		t.Errorf("an unhealthy upstream was dialed for a held client: got %d requests, want the first only", n)
	}
	sick.answer("/health", nil)
	p.waitHealth(t, 2*time.Second+slack, map[string]bool{sick.addr: true})
	p.waitState(t, p.connections(t)[0].ID, "open", sick.addr)
	held.send(t, ws.OpText, "still here")
	held.wantText(t, "still here")
}

// A client that may wait is let in when the upstream is healthy again, long before the
// next probe is due.
func TestHurriedProbeForNewClient(t *testing.T) {
	sick := startPatient(t)
	sick.answer("/health", answers(response(503, "no")))
	p := startCaddy(t, "", "websocket_proxy "+sick.addr+" {\n lb_try_duration 14s\n health_interval 1h\n health_ws /health\n}")
	p.waitHealth(t, slack, map[string]bool{sick.addr: false})
	var probes atomic.Int32
	sick.answer("/health", func(r *http.Request, c *rawConn) {
		if probes.Add(1) < 2 {
			answers(response(503, "not yet"))(r, c)
			return
		}
		echoRaw(r, c)
	})
	if got := p.status(t); got != http.StatusSwitchingProtocols {
		t.Errorf("got %d, want 101 once the upstream is well", got)
	}
	if n := probes.Load(); n != 2 {
		t.Errorf("probes while the client waited: got %d, want two", n)
	}
	if n := len(sick.asked("/chat")); n != 1 {
		t.Errorf("requests at the backend: got %d, want one", n)
	}
}
